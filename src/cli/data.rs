//! `trainer data`

use std::{
    process::ExitCode,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use clap::{Args, Subcommand, ValueEnum};
use jiff::civil::Date;

use super::{
    output::{self, Table},
    store,
};
use crate::{
    data::{
        DocumentFormat, LayoutSettings,
        prepare::{self, Phase, PrepareEvent, PrepareSettings, PrepareSummary, TokenizerSource},
    },
    error::{Error, Kind, Result},
    report::{Screen, human},
    task,
};

/// Prepare training data
#[derive(Debug, Subcommand)]
pub enum Data {
    Prepare(Prepare),
}

/// Turn text, JSON records or Parquet into token shards
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer data prepare --input 'src/**/*.rs' --tokenizer train:4096 --out runs/data/rust
  trainer data prepare --input s3://bucket/text --tokenizer tokenizer.json --out s3://bucket/tokens
  trainer data prepare --input '*.jsonl.zst' --text-field doc.text --tokenizer my-model --out data
  trainer data prepare --input chats.jsonl --format chat --sequence-length 2048 --tokenizer my-model --out data
  trainer data prepare --source web='web/**/*.txt' --source code=s3://bucket/code --tokenizer my-model --out data

The first bytes of a file decide how it is read: as JSON lines, an array of JSON objects,
Parquet, or plain text. Each may be compressed with gzip or zstd.
Tables, other archives and text that is not UTF-8 are left out, up to 5 of 100 files.
The same inputs and settings give the same shards; a dataset that already exists is reused.")]
pub struct Prepare {
    /// A path, folder, glob or URI of text, JSON records or Parquet; repeatable
    #[arg(long, required_unless_present = "source", value_name = "GLOB|URI", num_args = 1)]
    input: Vec<String>,
    /// The same with a name, by which its held-out loss is reported; repeatable
    #[arg(long, value_name = "NAME=GLOB|URI", num_args = 1, value_parser = named)]
    source: Vec<(String, String)>,
    /// A Hugging Face tokenizer.json or its folder, by path or URI, or train:VOCAB to train one on the input
    #[arg(long, value_name = "FILE|DIR|URI|train:VOCAB")]
    tokenizer: TokenizerSource,
    /// The folder or URI to write
    #[arg(long, value_name = "URI")]
    out: String,
    /// Print a summary as JSON
    #[arg(long)]
    json: bool,
    /// What records hold: `text`, or `chat`: a list of messages, rendered by the chat template of --tokenizer
    #[arg(long, value_name = "WHAT", value_enum, default_value = "text", help_heading = "Documents")]
    format: Format,
    /// Pack whole texts into rows of --sequence-length; a chat always is
    #[arg(long, help_heading = "Documents")]
    pack: bool,
    /// The data.sequence_length of the run that rows are packed for
    #[arg(long, value_name = "TOKENS", help_heading = "Documents")]
    sequence_length: Option<u32>,
    /// Texts that follow one another: `joined`: attend to each other; `apart`: don't
    #[arg(long, value_name = "HOW", value_enum, default_value = "joined", help_heading = "Documents")]
    documents: Neighbours,
    /// What to do with documents that are longer than a row: `error`: fail; `drop`: leave them out and count them
    #[arg(long, value_name = "WHAT", value_enum, default_value = "error", help_heading = "Documents")]
    too_long: Unfit,
    /// What to do with chats without a turn of the assistant: `error`: fail; `drop`: leave them out and count them
    #[arg(long, value_name = "WHAT", value_enum, default_value = "error", help_heading = "Documents")]
    without_target: Unfit,
    /// The day that a chat template is told when it asks for today's date
    #[arg(long, value_name = "YYYY-MM-DD", help_heading = "Documents")]
    date: Option<Date>,
    /// The name of the chat template, of a folder with several [default: `tool_use` for chats with tools, else
    /// `default`]
    #[arg(long, value_name = "NAME", help_heading = "Documents")]
    chat_template: Option<String>,
    /// The share of the text that is kept for validation, 0 to 0.5 [default: 0.01]
    #[arg(long, value_name = "SHARE", help_heading = "Details")]
    validation_ratio: Option<f64>,
    /// The field of JSON records, or column of Parquet, that holds the text, such as doc.text [default: text]
    #[arg(long, value_name = "NAME", help_heading = "Details")]
    text_field: Option<String>,
    /// The token between documents [default: the tokenizer's end of text]
    #[arg(long, value_name = "TOKEN", help_heading = "Details")]
    eos_token: Option<String>,
    /// Tokens in one shard [default: 67108864]
    #[arg(long, value_name = "N", help_heading = "Details")]
    shard_tokens: Option<u64>,
    /// The maximum text to train a tokenizer on, bytes [default: 4096 for each entry of its vocabulary]
    #[arg(long, value_name = "BYTES", help_heading = "Details")]
    sample_bytes: Option<u64>,
    /// Encoding threads [default: one per core]
    #[arg(long, value_name = "N", help_heading = "Details")]
    threads: Option<usize>,
    /// Continue without unreadable inputs, however many
    #[arg(long, help_heading = "Details")]
    skip_unreadable: bool,
    /// What to do with an unreadable record: `error`: fail; `skip`: leave it out and count it
    #[arg(long, value_name = "WHAT", value_enum, default_value = "error", help_heading = "Details")]
    bad_records: BadRecords,
    /// Replace a different dataset that already exists
    #[arg(long, help_heading = "Details")]
    overwrite: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BadRecords {
    Error,
    Skip,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Chat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Neighbours {
    Joined,
    Apart,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Unfit {
    Error,
    Drop,
}

/// `NAME=INPUT`.
fn named(text: &str) -> std::result::Result<(String, String), String> {
    let (name, input) = text.split_once('=').ok_or("write NAME=INPUT, such as code='src/**/*.rs'")?;
    Ok((name.to_owned(), input.to_owned()))
}

impl Data {
    pub(super) fn execute(self, screen: &Screen) -> Result<ExitCode> {
        match self {
            Self::Prepare(prepare) => prepare.execute(screen),
        }
    }
}

impl Prepare {
    fn execute(self, screen: &Screen) -> Result<ExitCode> {
        if let Some(task) = task::registered() {
            let what =
                format!("data prepare makes tokens for language models, and this program trains the task {task}");
            return Err(Error::new(Kind::Usage, what)
                .with_hint("a task makes its own batches; give the same arguments to `trainer` itself for tokens"));
        }
        let json = self.json;
        let settings = self.settings()?;
        let progress = Progress::new(screen);
        tracing::info!("looking for inputs");
        let summary =
            store::block_on(async move { Ok(prepare::prepare(settings, move |event| progress.show(&event)).await?) })?;
        output::emit(&if json { output::json_lines([&summary])? } else { table(&summary) })?;
        Ok(ExitCode::SUCCESS)
    }

    fn settings(self) -> Result<PrepareSettings> {
        let defaults = PrepareSettings::new(self.input, self.tokenizer, store::absolute(&self.out)?);
        Ok(PrepareSettings {
            sources: self.source,
            validation_ratio: self.validation_ratio.unwrap_or(defaults.validation_ratio),
            shard_tokens: self.shard_tokens.unwrap_or(defaults.shard_tokens),
            text_field: self.text_field.unwrap_or(defaults.text_field),
            eos_token: self.eos_token,
            sample_bytes: self.sample_bytes,
            overwrite: self.overwrite,
            skip_unreadable: self.skip_unreadable,
            skip_bad_records: self.bad_records == BadRecords::Skip,
            layout: LayoutSettings {
                format: match self.format {
                    Format::Text => DocumentFormat::Text,
                    Format::Chat => DocumentFormat::Chat,
                },
                pack: self.pack,
                sequence_length: self.sequence_length,
                apart: self.documents == Neighbours::Apart,
                date: self.date,
                chat_template: self.chat_template,
                drop_too_long: self.too_long == Unfit::Drop,
                drop_without_target: self.without_target == Unfit::Drop,
            },
            threads: self.threads.unwrap_or(defaults.threads),
            ..defaults
        })
    }
}

fn table(summary: &PrepareSummary) -> String {
    let mut table = Table::new(&["dataset", ">train tokens", ">validation", ">vocabulary", ">shards", ">documents"]);
    table.row([
        summary.uri.clone(),
        summary.train_tokens.to_string(),
        summary.validation_tokens.to_string(),
        summary.vocab_size.to_string(),
        summary.shards.to_string(),
        if summary.reused { "(was there)".into() } else { summary.documents.to_string() },
    ]);
    let mut text = table.text();
    if summary.skipped > 0 {
        text.push_str(&format!("{} of {} were left out\n", summary.skipped, human::plural(summary.files, "file")));
    }
    if let Some(targets) = summary.targets {
        text.push_str(&format!("{} of them are targets\n", human::plural(targets, "training token")));
    }
    for (count, why) in [(summary.too_long, "longer than a row"), (summary.without_target, "without a target")] {
        if count > 0 {
            text.push_str(&format!("{} left out, {why}\n", human::plural(count, "document")));
        }
    }
    if summary.bad_records > 0 {
        text.push_str(&format!("{} left out\n", human::plural(summary.bad_records, "record")));
    }
    text
}

/// Shows a preparation: a bar on a terminal, a line every few seconds elsewhere.
struct Progress {
    bar: Option<indicatif::ProgressBar>,
    last_line: Mutex<Instant>,
}

impl Progress {
    const PAUSE: Duration = Duration::from_secs(5);

    fn new(screen: &Screen) -> Self {
        Self { bar: screen.bytes_bar("preparing"), last_line: Mutex::new(Instant::now()) }
    }

    /// Moves the bar, or writes a line if the last one was a while ago.
    fn advance(&self, doing: &str, done: u64, all: u64, so_far: String) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(all);
                bar.set_position(done);
                bar.set_message(so_far);
            }
            None => {
                let mut last = self.last_line.lock().unwrap_or_else(PoisonError::into_inner);
                if last.elapsed() >= Self::PAUSE {
                    *last = Instant::now();
                    tracing::info!("{doing} {} of {}, {so_far}", human::bytes(done), human::bytes(all));
                }
            }
        }
    }

    fn show(&self, event: &PrepareEvent) {
        match event {
            PrepareEvent::Found { files, bytes } => {
                tracing::info!(size = %human::bytes(*bytes), "found {}", human::plural(*files, "file"));
            }
            PrepareEvent::Phase { phase, seconds: 0 } => match phase {
                Phase::Sampling => tracing::info!("reading text to train a tokenizer on"),
                // Reported with the size of its text.
                Phase::TokenizerTraining => {}
                Phase::Encoding => tracing::info!("encoding"),
                Phase::Writing => tracing::info!("writing the last shards"),
            },
            PrepareEvent::Phase { phase, seconds } => {
                let doing = match phase {
                    Phase::Sampling => "reading text",
                    Phase::TokenizerTraining => "training tokenizer",
                    Phase::Encoding => "encoding",
                    Phase::Writing => "writing",
                };
                match &self.bar {
                    Some(bar) => bar.set_message(format!("{doing}: {seconds} s")),
                    None => tracing::info!("{doing}: {seconds} s so far"),
                }
            }
            PrepareEvent::Fetching { bytes, bytes_total } => {
                self.advance("fetched", *bytes, *bytes_total, "waiting for the next".into());
            }
            PrepareEvent::Sampling { input_bytes, input_bytes_total, sample_bytes } => {
                let so_far = format!("{} of text for the tokenizer", human::bytes(*sample_bytes));
                self.advance("looked through", *input_bytes, *input_bytes_total, so_far);
            }
            PrepareEvent::TokenizerTraining { sample_bytes } => {
                tracing::info!(sample = %human::bytes(*sample_bytes), "training tokenizer");
            }
            PrepareEvent::TokenizerReady { vocab_size } => tracing::info!(vocab_size, "tokenizer is ready"),
            PrepareEvent::Progress { input_bytes, input_bytes_total, tokens, .. } => {
                self.advance("encoded", *input_bytes, *input_bytes_total, format!("{tokens} tokens"));
            }
            PrepareEvent::Skipped { input, reason } => {
                tracing::warn!(input = %human::plain(input), "skipped: {}", human::plain(reason));
            }
            PrepareEvent::Warning { message } => tracing::warn!("{}", human::plain(message)),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
