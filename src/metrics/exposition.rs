//! What a run is like now, as Prometheus reads it: the newest value of each figure.
//!
//! Counters are those of the journal, so they continue over restarts and machines, and never go back. What a step says
//! is a gauge: a run that resumes from an older checkpoint does steps again.
//!
//! Forms: Prometheus's text format 0.0.4, and OpenMetrics 1.0, of which each sample has the same name in both.
//! Sources: <https://prometheus.io/docs/instrumenting/exposition_formats/>,
//! <https://prometheus.io/docs/specs/om/open_metrics_spec/>, <https://prometheus.io/docs/practices/naming/>.

use std::{collections::BTreeMap, fmt::Write};

use crate::{
    ids::Step,
    report::{Counted, Event},
};

/// How the text is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Prometheus's own, which a node exporter's textfile has, too.
    Prometheus,
    /// OpenMetrics.
    OpenMetrics,
}

impl Form {
    /// Its media type.
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The one that a scraper's `Accept` header asks for.
    pub fn accepted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") { Self::OpenMetrics } else { Self::Prometheus }
    }
}

/// Whether a value may go back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

/// Everything that is exposed. Cheap to feed; the text is made when it is asked for.
#[derive(Clone, Debug, Default)]
pub struct Exposition {
    counted: Counted,
    /// Checkpoints, since the journal was counted.
    checkpoints: u64,
    durable: Step,
    /// By the name of the metric, then by its label, if it has one.
    gauges: BTreeMap<(&'static str, String), f64>,
}

/// Name, unit, and what it means, of each gauge.
const GAUGES: &[(&str, &str, &str)] = &[
    ("trainer_capture_stall_seconds", "seconds", "How long the newest checkpoint's capture has held training up"),
    ("trainer_checkpoint_bytes", "bytes", "Bytes of the newest checkpoint"),
    ("trainer_checkpoint_copy_seconds", "seconds", "How long its copy into host memory took"),
    ("trainer_checkpoint_durable_seconds", "seconds", "From the end of its step until it was durable"),
    ("trainer_device_peak_bytes", "bytes", "The most that tensors on a GPU have taken, of any rank"),
    ("trainer_device_reserved_bytes", "bytes", "The most that was taken from a GPU, by any rank"),
    ("trainer_durable_lag_seconds", "seconds", "Age of the newest checkpoint: what a kill would cost now"),
    ("trainer_durable_lag_steps", "", "Steps since the newest checkpoint"),
    ("trainer_finished", "", "1: the run is complete; 0: it is not"),
    ("trainer_gradient_norm", "", "2-norm of the newest step's gradient, before clipping"),
    ("trainer_held_out_loss", "", "The newest held-out loss; by source where the data has named ones"),
    ("trainer_host_peak_bytes", "bytes", "The most host memory that a worker has taken"),
    ("trainer_learning_rate", "", "Learning rate of the newest step"),
    ("trainer_loss", "", "Loss of the newest step"),
    ("trainer_model_flops_utilization_ratio", "ratio", "What the model needed of what the devices can compute"),
    ("trainer_nodes", "", "Nodes of the group"),
    ("trainer_notice_deadline_seconds", "seconds", "Time from the newest notice to the end of this machine"),
    ("trainer_planned_steps", "", "Steps of the whole run"),
    ("trainer_step", "", "The newest step"),
    ("trainer_step_part_seconds", "seconds", "Parts of the newest step's time"),
    ("trainer_step_seconds", "seconds", "Time of the newest step, on the slowest rank"),
    ("trainer_tokens", "", "Tokens that the newest step's state was trained on"),
    ("trainer_tokens_per_second", "", "Tokens a second of the newest step"),
    ("trainer_workers", "", "Workers of the group"),
];

impl Exposition {
    /// Takes in what an event says.
    pub fn hear(&mut self, event: &Event) {
        match event {
            Event::Counted(counted) => {
                self.counted = (**counted).clone();
                self.checkpoints = 0;
                self.durable = self.durable.max(counted.durable);
                self.set("trainer_finished", 0.0);
            }
            Event::Formed { world_size, total_steps, nodes, .. } => {
                self.set("trainer_workers", f64::from(world_size.get()));
                self.set("trainer_planned_steps", *total_steps as f64);
                self.set("trainer_nodes", f64::from(nodes.unwrap_or(1)));
                // A notice was for the generation before.
                self.gauges.retain(|(name, _), _| *name != "trainer_notice_deadline_seconds");
            }
            Event::Step {
                step, loss, lr, grad_norm, tokens, tokens_per_s, step_s, lag_steps, lag_s, spent, ..
            } => {
                self.set("trainer_step", step.get() as f64);
                self.set("trainer_loss", *loss);
                self.set("trainer_learning_rate", *lr);
                self.set("trainer_gradient_norm", *grad_norm);
                self.set("trainer_tokens", *tokens as f64);
                self.set("trainer_tokens_per_second", *tokens_per_s);
                self.set("trainer_step_seconds", *step_s);
                self.set("trainer_durable_lag_steps", *lag_steps as f64);
                self.set("trainer_durable_lag_seconds", *lag_s);
                if let Some(spent) = spent {
                    for (part, seconds) in [
                        ("backward", spent.backward_s),
                        ("capture", spent.capture_s),
                        ("data", spent.data_s),
                        ("forward", spent.forward_s),
                        ("optimizer", spent.optimizer_s),
                        ("reduce", spent.reduce_s),
                    ] {
                        self.gauges.insert(("trainer_step_part_seconds", label("part", part)), seconds);
                    }
                    if let Some(mfu) = spent.mfu {
                        self.set("trainer_model_flops_utilization_ratio", mfu);
                    }
                    if let Some(memory) = spent.memory {
                        self.set("trainer_host_peak_bytes", memory.host_peak_bytes as f64);
                        for (name, bytes) in [
                            ("trainer_device_peak_bytes", memory.device_peak_bytes),
                            ("trainer_device_reserved_bytes", memory.device_reserved_bytes),
                        ] {
                            if let Some(bytes) = bytes {
                                self.set(name, bytes as f64);
                            }
                        }
                    }
                }
            }
            Event::Validation { loss, sources, .. } => {
                self.set("trainer_held_out_loss", *loss);
                for (source, loss) in sources {
                    self.gauges.insert(("trainer_held_out_loss", label("source", source)), *loss);
                }
            }
            Event::Checkpoint { step, bytes, stall_s, copy_s, durable_s, .. } => {
                self.checkpoints += 1;
                self.durable = self.durable.max(*step);
                self.set("trainer_checkpoint_bytes", *bytes as f64);
                self.set("trainer_capture_stall_seconds", *stall_s);
                self.set("trainer_checkpoint_copy_seconds", *copy_s);
                self.set("trainer_checkpoint_durable_seconds", *durable_s);
            }
            Event::Notice { deadline_s: Some(left), .. } => self.set("trainer_notice_deadline_seconds", *left),
            Event::Completed { .. } => self.set("trainer_finished", 1.0),
            _ => {}
        }
    }

    fn set(&mut self, name: &'static str, value: f64) {
        self.gauges.insert((name, String::new()), value);
    }

    /// The text.
    pub fn text(&self, form: Form) -> String {
        let mut text = String::new();
        if let Some(run_id) = &self.counted.run_id {
            let run = label("run_id", run_id.as_str());
            let Counted { generations, checkpoints, interruptions, lost_steps, worker_restarts, .. } = self.counted;
            for (name, value, help) in [
                ("trainer_checkpoints", checkpoints + self.checkpoints, "Checkpoints that have become durable"),
                ("trainer_durable_steps", self.durable.get(), "The newest step that a checkpoint holds"),
                ("trainer_generations", generations, "Groups of workers that were formed"),
                ("trainer_interruptions", interruptions, "Ends of a generation before the last step, as recorded"),
                ("trainer_lost_steps", lost_steps, "Steps that were done again, or are to be, as recorded"),
                ("trainer_worker_restarts", worker_restarts, "Restarts because a worker had died"),
            ] {
                head(&mut text, form, Kind::Counter, name, "", help);
                let _ = writeln!(text, "{name}_total{{{run}}} {value}");
            }
            for (name, unit, help) in GAUGES {
                let samples = self.gauges.range((*name, String::new())..).take_while(|((of, _), _)| of == name);
                let mut samples = samples.peekable();
                if samples.peek().is_some() {
                    head(&mut text, form, Kind::Gauge, name, unit, help);
                }
                for ((_, label), value) in samples {
                    let labels = if label.is_empty() { run.clone() } else { format!("{run},{label}") };
                    let _ = writeln!(text, "{name}{{{labels}}} {}", number(*value));
                }
            }
        }
        if form == Form::OpenMetrics {
            text.push_str("# EOF\n");
        }
        text
    }
}

/// The comments in front of a metric. `text` takes everything that is written to it.
fn head(text: &mut String, form: Form, kind: Kind, name: &str, unit: &str, help: &str) {
    let (suffix, kind_name) = match (kind, form) {
        // Prometheus's own format knows samples, OpenMetrics the metric that they belong to.
        (Kind::Counter, Form::Prometheus) => ("_total", "counter"),
        (Kind::Counter, Form::OpenMetrics) => ("", "counter"),
        (Kind::Gauge, _) => ("", "gauge"),
    };
    let _ = writeln!(text, "# TYPE {name}{suffix} {kind_name}");
    if form == Form::OpenMetrics && !unit.is_empty() {
        let _ = writeln!(text, "# UNIT {name} {unit}");
    }
    let _ = writeln!(text, "# HELP {name}{suffix} {help}.");
}

/// A label; its value may hold anything.
fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

/// A value as both formats write it.
fn number(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "+Inf" } else { "-Inf" }.to_owned()
    } else {
        value.to_string()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        ids::{Generation, RunId, WorldSize},
        report::{Memory, Spent},
    };

    pub(in crate::metrics) fn counted(checkpoints: u64, durable: u64) -> Event {
        Event::Counted(Box::new(Counted {
            run_id: Some(RunId::new("first").unwrap()),
            generations: 3,
            checkpoints,
            durable: Step(durable),
            interruptions: 2,
            lost_steps: 7,
            worker_restarts: 1,
        }))
    }

    fn checkpoint(step: u64) -> Event {
        Event::Checkpoint {
            step: Step(step),
            generation: Generation(3),
            bytes: 1 << 20,
            stall_s: 0.001,
            copy_s: 0.125,
            durable_s: 1.5,
        }
    }

    fn step(step: u64, loss: f64) -> Event {
        let memory = Some(Memory { host_peak_bytes: 4096, device_peak_bytes: Some(8192), ..Memory::default() });
        Event::Step {
            step: Step(step),
            loss,
            lr: 3e-4,
            grad_norm: 1.5,
            tokens: 512 * step,
            tokens_per_s: 1024.0,
            step_s: 0.5,
            stall_s: 0.0,
            lag_steps: 1,
            lag_s: 0.25,
            spent: Some(Box::new(Spent { data_s: 0.125, mfu: Some(0.5), memory, ..Spent::default() })),
        }
    }

    fn value(text: &str, sample: &str) -> Option<f64> {
        text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')?.parse().ok())
    }

    #[test]
    fn every_figure_has_its_name_its_kind_and_its_newest_value() {
        let mut exposition = Exposition::default();
        assert_eq!(exposition.text(Form::OpenMetrics), "# EOF\n");
        let formed = Event::Formed {
            generation: Generation(3),
            world_size: WorldSize(4),
            resume_step: Some(Step(6)),
            total_steps: 100,
            shares: None,
            nodes: Some(2),
            leader: None,
        };
        let sources = [("code".to_owned(), 2.5), ("a \"b\"\\\nc".to_owned(), 3.5)].into();
        let held_out = Event::Validation { step: Step(8), loss: 3.0, sources };
        for event in [counted(5, 6), formed, step(7, 4.5), step(8, 4.25), held_out, checkpoint(8)] {
            exposition.hear(&event);
        }
        let text = exposition.text(Form::OpenMetrics);
        for (sample, expected) in [
            (r#"trainer_checkpoints_total{run_id="first"}"#, 6.0),
            (r#"trainer_durable_steps_total{run_id="first"}"#, 8.0),
            (r#"trainer_generations_total{run_id="first"}"#, 3.0),
            (r#"trainer_lost_steps_total{run_id="first"}"#, 7.0),
            (r#"trainer_step{run_id="first"}"#, 8.0),
            (r#"trainer_loss{run_id="first"}"#, 4.25),
            (r#"trainer_nodes{run_id="first"}"#, 2.0),
            (r#"trainer_workers{run_id="first"}"#, 4.0),
            (r#"trainer_step_part_seconds{run_id="first",part="data"}"#, 0.125),
            (r#"trainer_model_flops_utilization_ratio{run_id="first"}"#, 0.5),
            (r#"trainer_device_peak_bytes{run_id="first"}"#, 8192.0),
            (r#"trainer_held_out_loss{run_id="first"}"#, 3.0),
            (r#"trainer_held_out_loss{run_id="first",source="code"}"#, 2.5),
            (r#"trainer_held_out_loss{run_id="first",source="a \"b\"\\\nc"}"#, 3.5),
            (r#"trainer_finished{run_id="first"}"#, 0.0),
        ] {
            assert_eq!(value(&text, sample), Some(expected), "{sample} in\n{text}");
        }
        assert!(text.contains("# TYPE trainer_checkpoints counter\n") && text.ends_with("\n# EOF\n"), "{text}");
        assert!(text.contains("# UNIT trainer_step_seconds seconds\n"), "{text}");
        let plain = exposition.text(Form::Prometheus);
        assert!(plain.contains("# TYPE trainer_checkpoints_total counter\n") && !plain.contains("EOF"), "{plain}");
        let samples =
            |text: &str| text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<String>>();
        assert_eq!(samples(&text), samples(&plain));
        // A name with a unit ends with it, and every gauge that can be set has a line in the table.
        for (name, _) in exposition.gauges.keys() {
            assert!(GAUGES.iter().any(|(known, ..)| known == name), "{name}");
        }
        assert!(GAUGES.iter().all(|(name, unit, _)| name.ends_with(unit)), "{GAUGES:?}");
        assert!(GAUGES.is_sorted_by_key(|(name, ..)| *name));
    }

    #[test]
    fn the_dashboard_asks_for_figures_that_are_shown() {
        let dashboard = include_str!("../../userdata/grafana.json");
        let counters =
            ["checkpoints", "durable_steps", "generations", "interruptions", "lost_steps", "worker_restarts"];
        let known = |name: &str| {
            GAUGES.iter().any(|(gauge, ..)| *gauge == name)
                || counters.iter().any(|counter| name == format!("trainer_{counter}_total"))
        };
        let names = dashboard.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let names: Vec<&str> = names.filter(|word| word.starts_with("trainer_")).collect();
        assert!(names.len() > 20);
        for name in names {
            assert!(known(name), "{name}");
        }
    }

    #[test]
    fn counters_never_go_back_although_steps_do() {
        let mut exposition = Exposition::default();
        let mut before = [0.0; 2];
        let names = ["trainer_checkpoints_total", "trainer_durable_steps_total"];
        // Two saves, a kill, a resume from the older of both, which another machine has counted, the same step again.
        for event in [
            counted(0, 0),
            step(4, 1.0),
            checkpoint(4),
            step(8, 1.0),
            checkpoint(8),
            counted(2, 8),
            step(5, 1.0),
            step(8, 1.0),
            checkpoint(8),
        ] {
            exposition.hear(&event);
            let text = exposition.text(Form::OpenMetrics);
            let now = names.map(|name| value(&text, &format!("{name}{{run_id=\"first\"}}")).unwrap());
            assert!(now[0] >= before[0] && now[1] >= before[1], "{before:?}, then {now:?}");
            before = now;
        }
        assert_eq!(before, [3.0, 8.0]);
    }

    #[test]
    fn what_is_no_number_is_written_as_the_formats_say() {
        assert_eq!([f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.1].map(number), ["NaN", "+Inf", "-Inf", "0.1"]);
        assert_eq!(Form::accepted("application/openmetrics-text;version=1.0.0,text/plain;q=0.5"), Form::OpenMetrics);
        assert_eq!([Form::accepted("*/*"), Form::accepted("")], [Form::Prometheus; 2]);
    }
}
