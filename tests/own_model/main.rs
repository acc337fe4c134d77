//! A program with a model of its own: it learns to tell circles, squares and crosses apart, in pictures that it draws.
//!
//! `cargo run --example shapes -- run tests/own_model/shapes.toml`

use std::{path::PathBuf, process::ExitCode};

use serde::{Deserialize, Serialize};
use trainer::{
    task::{Fallible, Parameter, Parameters, Sample, Samples, Split, Task, Trainable},
    tch::{Device, Kind, Reduction, Tensor},
};

const SIDE: u16 = 12;
const SHAPES: [&str; 3] = ["circle", "square", "cross"];

struct Shapes;

#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Settings {
    /// Pictures to train on, and pictures held out.
    pictures: u64,
    held_out: u64,
    /// Channels of the first layer; the second has twice as many.
    channels: u64,
    /// Noise in every pixel, drawn anew whenever a picture is seen.
    noise: f64,
    dropout: f64,
    /// A file that lists the shapes to draw, one a line, by its absolute path; none: all of them.
    shapes: Option<PathBuf>,
    /// A picture that can't be read, for tests; and whether that is a panic.
    damaged: Option<u64>,
    panics: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let (pictures, held_out, channels, noise, dropout) = (2000, 200, 8, 0.3, 0.1);
        Self { pictures, held_out, channels, noise, dropout, shapes: None, damaged: None, panics: false }
    }
}

impl Task for Shapes {
    type Settings = Settings;
    type Trainable = Pictures;

    fn name(&self) -> &str {
        "shapes"
    }

    fn version(&self) -> u32 {
        // A program has a number here. Tests play a later version of this one.
        std::env::var("TRAINER_TESTS_VERSION").ok().and_then(|version| version.parse().ok()).unwrap_or(1)
    }

    fn open(&self, settings: Settings) -> Fallible<Pictures> {
        let listed = match &settings.shapes {
            None => SHAPES.join("\n"),
            Some(file) => std::fs::read_to_string(file).map_err(|error| format!("shapes = {file:?}: {error}"))?,
        };
        let shapes = listed.lines().map(|name| {
            SHAPES.iter().position(|shape| *shape == name).ok_or_else(|| format!("{name:?} is none of {SHAPES:?}"))
        });
        let shapes = shapes.collect::<Result<Vec<usize>, _>>()?;
        if shapes.is_empty() || settings.channels == 0 {
            return Err("there must be shapes and channels".into());
        }
        Ok(Pictures { settings, shapes })
    }
}

struct Pictures {
    settings: Settings,
    shapes: Vec<usize>,
}

impl Trainable for Pictures {
    fn parameters(&self) -> Vec<Parameter> {
        let (few, many, classes) = (self.settings.channels, 2 * self.settings.channels, SHAPES.len() as u64);
        // Each layer's deviation keeps the size of its outputs near that of its inputs.
        let weight = |name, shape: &[u64]| {
            let inputs: u64 = shape[1..].iter().product();
            Parameter::normal(name, shape, (2.0 / inputs as f64).sqrt())
        };
        vec![
            weight("first.weight", &[few, 1, 3, 3]),
            Parameter::zeros("first.bias", &[few]),
            weight("second.weight", &[many, few, 3, 3]),
            Parameter::zeros("second.bias", &[many]),
            weight("head.weight", &[classes, many * 9]),
            Parameter::zeros("head.bias", &[classes]),
        ]
    }

    fn samples(&self) -> Samples {
        Samples { train: self.settings.pictures, held_out: self.settings.held_out }
    }

    fn identity(&self) -> String {
        let Settings { pictures, held_out, .. } = &self.settings;
        format!("{pictures} pictures, {held_out} held out, of shapes {:?}", self.shapes)
    }

    fn batch(&mut self, split: Split, samples: &[Sample], device: Device) -> Fallible<Vec<Tensor>> {
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        for sample in samples {
            if split == Split::Train && self.settings.damaged == Some(sample.index) {
                assert!(!self.settings.panics, "picture {} is damaged", sample.index);
                return Err(format!("picture {} is damaged", sample.index).into());
            }
            // What a picture shows follows from its number.
            let number = if split == Split::Train { sample.index } else { u64::MAX - sample.index };
            let shape = self.shapes[(number % self.shapes.len() as u64) as usize];
            draw(shape, &mut Random(number), &mut Random(sample.seed), self.settings.noise, &mut pixels);
            labels.push(shape as i64);
        }
        let side = i64::from(SIDE);
        let pictures = Tensor::f_from_slice(&pixels)?.f_view([samples.len() as i64, 1, side, side])?;
        Ok(vec![pictures.f_to_device(device)?, Tensor::f_from_slice(&labels)?.f_to_device(device)?])
    }

    fn loss(&self, parameters: &Parameters<'_>, batch: &[Tensor]) -> Fallible<Tensor> {
        let scores = self.scores(parameters, &batch[0], true)?;
        Ok(scores.f_cross_entropy_loss(&batch[1], None::<&Tensor>, Reduction::Sum, -100, 0.0)?)
    }

    /// How many pictures are taken for another shape: what is printed is their share.
    fn evaluate(&self, parameters: &Parameters<'_>, batch: &[Tensor]) -> Fallible<Tensor> {
        let found = self.scores(parameters, &batch[0], false)?.f_argmax(-1, false)?;
        Ok(found.f_ne_tensor(&batch[1])?.f_sum(Kind::Float)?)
    }
}

impl Pictures {
    /// fp32 scores `[pictures, shapes]` for fp32 `pictures` `[pictures, 1, SIDE, SIDE]`.
    fn scores(&self, parameters: &Parameters<'_>, pictures: &Tensor, trains: bool) -> Fallible<Tensor> {
        let mut x = pictures.f_to_kind(parameters.kind())?;
        for layer in ["first", "second"] {
            let weight = parameters.get(&format!("{layer}.weight"))?;
            let bias = parameters.get(&format!("{layer}.bias"))?;
            // Every second pixel: from 12 × 12 to 6 × 6 to 3 × 3.
            x = x.f_conv2d(weight, Some(bias), [2, 2], [1, 1], [1, 1], 1)?.f_relu()?;
        }
        let x = x.f_flatten(1, -1)?.f_dropout(self.settings.dropout, trains)?;
        let scores = x.f_linear(parameters.get("head.weight")?, Some(parameters.get("head.bias")?))?;
        Ok(scores.f_to_kind(Kind::Float)?)
    }
}

/// Adds the pixels of one picture, row by row.
fn draw(shape: usize, place: &mut Random, grain: &mut Random, noise: f64, pixels: &mut Vec<f32>) {
    let (x, y, size) = (4.0 + 3.0 * place.next(), 4.0 + 3.0 * place.next(), 2.5 + 1.5 * place.next());
    for row in 0..SIDE {
        for column in 0..SIDE {
            let (dx, dy) = ((f32::from(column) - x).abs(), (f32::from(row) - y).abs());
            let is_ink = match shape {
                0 => ((dx * dx + dy * dy).sqrt() - size).abs() < 0.7,
                1 => (dx.max(dy) - size).abs() < 0.7,
                _ => dx.min(dy) < 0.7 && dx.max(dy) < size,
            };
            pixels.push(if is_ink { 1.0 } else { 0.0 } + noise as f32 * (2.0 * grain.next() - 1.0));
        }
    }
}

/// Numbers from 0 to 1 that follow from a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / 16_777_216.0
    }
}

fn main() -> ExitCode {
    trainer::main(Shapes)
}
