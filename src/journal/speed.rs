//! How fast a run was at a checkpoint's step, among the figures that the checkpoint is recorded with. Pure.
//!
//! It is there for people alone. The first checkpoint of a generation has it, and later ones now and then: records
//! without figures are stored in a few bytes.

use serde::Serialize;

use super::Metrics;

/// The beginning of the names of these figures.
pub const SPEED: &str = "speed/";

/// How fast a step was, and what its time was spent on: of the rank that the others wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Speed {
    /// Tokens a second, over all ranks.
    pub tokens_per_s: f64,
    /// Seconds of the step.
    pub step_s: f64,
    /// Of them, waiting for batches.
    pub data_s: f64,
    /// Forward passes.
    pub forward_s: f64,
    /// Backward passes, with the reduction of gradients behind them.
    pub backward_s: f64,
    /// The reduction beyond them.
    pub reduce_s: f64,
    /// Waiting for a copy of the state.
    pub capture_s: f64,
    /// The update.
    pub optimizer_s: f64,
    /// The share of what the devices can compute that the model needed; `None`: not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// The most bytes of a worker in the host's memory at any time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_peak_bytes: Option<f64>,
    /// The most bytes that LibTorch has taken from a GPU at any time; `None`: workers compute on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_peak_bytes: Option<f64>,
}

impl Speed {
    /// As figures of a checkpoint.
    pub fn metrics(&self) -> Metrics {
        let named = |(name, value): (&str, Option<f64>)| Some((format!("{SPEED}{name}"), value?));
        self.named().into_iter().filter_map(named).collect()
    }

    /// From the figures of a checkpoint, if it has them.
    pub fn of(metrics: &Metrics) -> Option<Self> {
        let get = |name: &str| metrics.get(&format!("{SPEED}{name}")).copied();
        let known = |name: &str| get(name).unwrap_or(0.0);
        Some(Self {
            tokens_per_s: get("tokens_per_s")?,
            step_s: known("step_s"),
            data_s: known("data_s"),
            forward_s: known("forward_s"),
            backward_s: known("backward_s"),
            reduce_s: known("reduce_s"),
            capture_s: known("capture_s"),
            optimizer_s: known("optimizer_s"),
            mfu: get("mfu"),
            host_peak_bytes: get("host_peak_bytes"),
            device_peak_bytes: get("device_peak_bytes"),
        })
    }

    fn named(&self) -> [(&'static str, Option<f64>); 11] {
        [
            ("tokens_per_s", Some(self.tokens_per_s)),
            ("step_s", Some(self.step_s)),
            ("data_s", Some(self.data_s)),
            ("forward_s", Some(self.forward_s)),
            ("backward_s", Some(self.backward_s)),
            ("reduce_s", Some(self.reduce_s)),
            ("capture_s", Some(self.capture_s)),
            ("optimizer_s", Some(self.optimizer_s)),
            ("mfu", self.mfu),
            ("host_peak_bytes", self.host_peak_bytes),
            ("device_peak_bytes", self.device_peak_bytes),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_back_as_they_were() {
        let (mfu, host_peak_bytes) = (Some(0.39), Some(1e9));
        let speed = Speed { tokens_per_s: 5e4, step_s: 0.3, data_s: 0.001, forward_s: 0.1, mfu, ..Speed::default() };
        for speed in [speed, Speed { host_peak_bytes, device_peak_bytes: Some(2e10), mfu: None, ..speed }] {
            let metrics = speed.metrics();
            assert!(metrics.keys().all(|name| name.starts_with(SPEED)), "{metrics:?}");
            assert_eq!(Speed::of(&metrics), Some(speed));
        }
        assert_eq!(Speed::of(&[("held_out/code".to_owned(), 1.0)].into()), None);
    }
}
