//! `trainer metrics`

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use jiff::Timestamp;

use super::{
    args::{JsonArg, RunArg},
    output::{self, Table},
    store,
};
use crate::{
    error::{Context, Error, Kind, Result},
    history,
    metrics::{self, Series, tensorboard},
    report::{self, human},
};

/// Show or write the figures of a run's steps: one curve, however often it was interrupted
#[derive(Debug, Args)]
#[command(after_help = "Example: trainer metrics --run-id first --tensorboard logs/first")]
pub struct Metrics {
    #[command(flatten)]
    pub(super) run: RunArg,
    #[command(flatten)]
    json: JsonArg,
    /// Print every step as a line of comma-separated values
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// Write every step to a Parquet file
    #[arg(long, value_name = "FILE")]
    parquet: Option<PathBuf>,
    /// Write an event file for TensorBoard into this folder
    #[arg(long, value_name = "DIR")]
    tensorboard: Option<PathBuf>,
}

/// Rows of the table.
const NEWEST: usize = 20;

impl Metrics {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let (curve, config) = store::block_on(async {
            let root = self.run.store.open()?;
            let state = history::read(&root, &self.run.run_id).await?;
            let (all, broken) = metrics::read(&root.folder(self.run.run_id.as_str())).await?;
            for broken in broken {
                report::say(format!("warning: some figures are missing: {broken}\n"));
            }
            let config = serde_json::to_string_pretty(state.config());
            let config = config.map_err(|error| Error::from_source(Kind::Bug, error))?;
            Ok::<_, Error>((all.curve(), config))
        })?;
        if let Some(path) = &self.parquet {
            let bytes = metrics::encode(&curve).map_err(|error| Error::from_source(Kind::Bug, error))?;
            create(path, |file| file.write_all(&bytes))?;
        }
        if let Some(folder) = &self.tensorboard {
            let made = std::fs::create_dir_all(folder).map_err(|error| Error::from_source(Kind::Usage, error));
            made.context(format!("create folder {}", folder.display()))?;
            // TensorBoard shows preformatted text as it is.
            let config: String = config.lines().map(|line| format!("    {line}\n")).collect();
            create(&folder.join(tensorboard::NAME), |file| tensorboard::write(&curve, &config, file))?;
        }
        let text = if self.json.json {
            json(&curve)?
        } else if self.csv {
            csv(&curve)
        } else if self.parquet.is_some() || self.tensorboard.is_some() {
            String::new()
        } else {
            table(&curve)
        };
        output::emit(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A file that appears whole, or not at all.
pub(super) fn create(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Result<()> {
    let doing = || format!("write {}", path.display());
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = path.with_file_name(name);
    let written = File::create(&part).and_then(|file| {
        let mut file = BufWriter::new(file);
        write(&mut file)?;
        file.flush()?;
        std::fs::rename(&part, path)
    });
    written.map_err(|error| {
        let _ = std::fs::remove_file(&part);
        Error::from_source(Kind::Usage, error).context(doing())
    })
}

fn time(at_ms: i64) -> String {
    Timestamp::from_millisecond(at_ms).map_or_else(|_| at_ms.to_string(), |at| at.to_string())
}

fn json(curve: &Series) -> Result<String> {
    let mut text = String::new();
    for row in curve.rows() {
        let mut object = serde_json::Map::new();
        object.insert("step".into(), row.step.get().into());
        object.insert("generation".into(), row.generation.get().into());
        object.insert("at".into(), time(row.at_ms).into());
        object.extend(row.figures.into_iter().map(|(name, value)| (name, value.into())));
        text += &serde_json::to_string(&object).map_err(|error| Error::from_source(Kind::Bug, error))?;
        text.push('\n');
    }
    Ok(text)
}

/// As in RFC 4180, but with line feeds alone.
fn csv(curve: &Series) -> String {
    let quoted = |name: &str| match name.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", name.replace('"', "\"\"")),
        false => name.to_owned(),
    };
    let mut text =
        ["step", "generation", "at"].into_iter().chain(curve.names()).map(quoted).collect::<Vec<_>>().join(",");
    text.push('\n');
    for (index, row) in curve.rows().enumerate() {
        text += &format!("{},{},{}", row.step, row.generation, time(row.at_ms));
        for name in curve.names() {
            text.push(',');
            let value = curve.column(name).and_then(|values| values.get(index)).filter(|value| !value.is_nan());
            if let Some(value) = value {
                text += &value.to_string();
            }
        }
        text.push('\n');
    }
    text
}

/// The newest steps.
fn table(curve: &Series) -> String {
    if curve.is_empty() {
        return "no figures are stored yet: they come with the first checkpoint, or after five minutes\n".into();
    }
    let mut table =
        Table::new(&[">step", ">generation", ">loss", ">held-out loss", ">gradient norm", ">tokens/s", ">step time"]);
    for index in curve.len().saturating_sub(NEWEST)..curve.len() {
        let Some(row) = curve.row(index) else { continue };
        let figure = |name: &str, digits: usize| match row.figures.get(name) {
            Some(value) => format!("{value:.digits$}"),
            None => "-".into(),
        };
        table.row([
            row.step.to_string(),
            row.generation.to_string(),
            figure("loss", 4),
            figure("held_out_loss", 4),
            figure("grad_norm", 3),
            figure("tokens_per_s", 0),
            row.figures.get("step_s").map_or_else(|| "-".into(), |value| human::seconds(*value)),
        ]);
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{Generation, Step},
        metrics::Row,
    };

    fn curve() -> Series {
        let mut series = Series::default();
        for (step, name) in [(1, "loss"), (2, "a,\"b\"")] {
            let figures = [(name.to_owned(), 0.1 + 0.2)].into();
            series.push(&Row { step: Step(step), generation: Generation(1), at_ms: 1_764_590_400_123, figures });
        }
        series
    }

    #[test]
    fn lines_have_every_digit_and_quote_what_must_be_quoted() {
        let at = "2025-12-01T12:00:00.123Z";
        assert_eq!(
            csv(&curve()),
            format!(
                "step,generation,at,\"a,\"\"b\"\"\",loss\n1,1,{at},,0.30000000000000004\n\
                 2,1,{at},0.30000000000000004,\n"
            )
        );
        let lines = json(&curve()).unwrap();
        let first: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
        assert_eq!(first, serde_json::json!({"step": 1, "generation": 1, "at": at, "loss": 0.1 + 0.2}));
        assert!(table(&curve()).contains("0.3000") && table(&Series::default()).contains("first checkpoint"));
    }
}
