//! `trainer explain`

use std::{fmt::Write, process::ExitCode};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg},
    history, output, store,
};
use crate::{
    error::Result,
    ids::{Generation, NodeId, RunId, Step},
    journal::{Drain, DrainPlan, Formation, FormedReason, Interruption, Means, RunState},
    report::human,
};

/// Explain each interruption: which notice came, what was done, what it cost
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer explain --run-id first
  trainer explain --run-id first --json | jq 'select(.lost_steps > 0)'

Everything comes from the run's journal.
Times within one interruption come from one machine's monotonic clock.
Times between machines are differences of their wall clocks.")]
pub struct Explain {
    #[command(flatten)]
    run: RunArg,
    #[command(flatten)]
    json: JsonArg,
}

/// How a generation ended before the run was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum How {
    /// It was asked to stop, and said what became of it.
    Stopped,
    /// It ended without a word: killed, or cut off from the store.
    Vanished,
    /// One of its workers died; the same machine carried on.
    WorkerDied,
}

/// A notice, as the journal has it.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Heard<'a> {
    at: Timestamp,
    source: &'a str,
    means: Means,
    deadline_s: Option<f64>,
}

/// What carried on.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Next<'a> {
    generation: Generation,
    node: &'a NodeId,
    resume_step: Option<Step>,
    /// From the end, or the last sign of life, until it was formed.
    away_s: f64,
}

/// One interruption.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Episode<'a> {
    generation: Generation,
    node: &'a NodeId,
    how: How,
    /// When it ended; of one that vanished, its last sign of life.
    at: Timestamp,
    /// The last finished step, where it was said.
    step: Option<Step>,
    /// The checkpoint that the run has carried on from, or can.
    checkpoint: Option<Step>,
    /// Finished steps that are done again, where that is known.
    lost_steps: Option<u64>,
    verdict: Option<&'a str>,
    notices: Vec<Heard<'a>>,
    drain: Option<&'a Drain>,
    /// By how much the prediction was off, counted from when the plan was made: 0.1 says that it took a tenth longer than expected.
    prediction_error: Option<f64>,
    next: Option<Next<'a>>,
}

/// What `--json` prints at the end.
#[derive(Debug, Serialize)]
struct Total<'a> {
    run_id: &'a RunId,
    interruptions: usize,
    /// Of those whose loss is known.
    lost_steps: u64,
    /// Interruptions whose loss nobody could write down.
    unknown: usize,
    away_s: f64,
}

impl Explain {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let state = store::block_on(async { history::read(&self.run.store.open()?, &self.run.run_id).await })?;
        let episodes = episodes(&state);
        let total = total(&state, &episodes);
        let text = if self.json.json {
            let mut text = output::json_lines(&episodes)?;
            text.push_str(&output::json_lines([&total])?);
            text
        } else {
            text(&episodes, &total)
        };
        output::emit(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn total<'a>(state: &'a RunState, episodes: &[Episode<'_>]) -> Total<'a> {
    Total {
        run_id: state.run_id(),
        interruptions: episodes.len(),
        lost_steps: episodes.iter().filter_map(|episode| episode.lost_steps).sum(),
        unknown: episodes.iter().filter(|episode| episode.lost_steps.is_none()).count(),
        away_s: episodes.iter().filter_map(|episode| Some(episode.next.as_ref()?.away_s)).sum(),
    }
}

/// Every generation that ended before the run was done, the oldest first. One that is last and has not said how it ended may still be
/// at work: it is none.
fn episodes(state: &RunState) -> Vec<Episode<'_>> {
    let formations = state.formations();
    let mut episodes = Vec::new();
    for (index, formed) in formations.iter().enumerate() {
        let said = state.interruptions().iter().find(|end| end.generation == formed.generation);
        let next = formations.get(index + 1);
        let how = match (said, next) {
            (Some(_), _) => How::Stopped,
            (None, _) if formed.ended.is_some() => continue,
            (None, None) => continue,
            (None, Some(next)) if next.reason == FormedReason::WorkerDied => How::WorkerDied,
            (None, Some(_)) => How::Vanished,
        };
        episodes.push(episode(state, formed, how, said, next));
    }
    episodes
}

fn episode<'a>(
    state: &'a RunState,
    formed: &'a Formation,
    how: How,
    said: Option<&'a Interruption>,
    next: Option<&'a Formation>,
) -> Episode<'a> {
    let generation = formed.generation;
    let notices: Vec<_> = state
        .notices()
        .iter()
        .filter(|notice| notice.generation == generation)
        .map(|n| Heard { at: n.at, source: &n.source, means: n.means, deadline_s: n.deadline_s })
        .collect();
    let commits = state.checkpoints().of(generation);
    let last_sign = commits.clone().map(|c| c.at).chain(notices.iter().map(|n| n.at)).chain([formed.at]).max();
    let at = said.map_or(last_sign.unwrap_or(formed.at), |said| said.at);
    let drain = said.and_then(|said| said.drain.as_ref());
    let newest = commits.map(|c| c.committed.step).chain(formed.resume.as_ref().map(|point| point.step)).max();
    Episode {
        generation,
        node: &formed.node,
        how,
        at,
        step: said.map(|said| said.step),
        checkpoint: said.map_or(newest, |said| said.committed),
        lost_steps: said.map(|said| said.lost_steps),
        verdict: said.map(|said| said.verdict.as_str()),
        notices,
        drain,
        prediction_error: drain.and_then(carried_out).and_then(|(expected, took)| Some(took? / expected - 1.0)),
        next: next.map(|next| Next {
            generation: next.generation,
            node: &next.node,
            resume_step: next.resume.as_ref().map(|point| point.step),
            away_s: next.at.duration_since(at).as_secs_f64().max(0.0),
        }),
    }
}

/// How long what was planned was to take, and took, from when it was planned: the time before, which may have been trained in, is not
/// the save's. `None`: nothing was expected, or the journal does not say when.
fn carried_out(drain: &Drain) -> Option<(f64, Option<f64>)> {
    let planned = drain.planned_s?;
    let expected = drain.predicted_s.map(|at| at - planned).filter(|expected| *expected > 0.0)?;
    Some((expected, drain.actual_s.map(|at| (at - planned).max(0.0))))
}

/// How wrong a prediction was, for people.
fn off(ratio: f64) -> String {
    if ratio < 2.0 { format!("{:.0} % off", 100.0 * (ratio - 1.0).abs()) } else { format!("{ratio:.1} times as long") }
}

const fn words(plan: DrainPlan) -> &'static str {
    match plan {
        DrainPlan::FullSave => "save everything",
        DrainPlan::OnlyMissing => "upload what was missing",
        DrainPlan::FinishInFlight => "finish the save under way",
        DrainPlan::StopEarly => "leave without a save",
    }
}

fn text(episodes: &[Episode<'_>], total: &Total<'_>) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = match (episodes.len(), total.unknown) {
        (0, _) => writeln!(text, "run {}: no interruption", total.run_id),
        (count, unknown) => {
            let more = match unknown {
                0 => String::new(),
                unknown => format!(" ({unknown} of unknown loss)"),
            };
            writeln!(
                text,
                "run {}: {}, {} lost{more}, {} away",
                total.run_id,
                human::plural(count as u64, "interruption"),
                human::plural(total.lost_steps, "step"),
                human::seconds(total.away_s)
            )
        }
    };
    for (number, episode) in (1..).zip(episodes) {
        text.push('\n');
        tell(&mut text, number, episode);
    }
    text
}

fn tell(text: &mut String, number: usize, episode: &Episode<'_>) {
    let Episode { generation, node, at, .. } = episode;
    let step = |step: Option<Step>| step.map_or_else(|| "the beginning".to_owned(), |step| format!("step {step}"));
    let mut line = |name: &str, what: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "   {name:<10} {}", human::plain(&what));
    };
    let when = at.strftime("%Y-%m-%d %H:%M:%S UTC");
    line(&format!("{number}."), format!("{when}, generation {generation} on node {node}"));
    match episode.drain {
        _ if !episode.notices.is_empty() => {}
        // The store did not take the notice's own record in time.
        Some(drain) => line("heard", drain.source.clone()),
        // Heard between two lives of the workers, when there was nothing to save.
        None if episode.how == How::Stopped => {
            line("heard", "a request to stop; whose was not written down".to_owned())
        }
        None => line("heard", "nothing: there was no warning".to_owned()),
    }
    for notice in &episode.notices {
        let left = match notice.deadline_s {
            Some(left) => format!("{} left", human::seconds(left)),
            None => "no deadline named".to_owned(),
        };
        line(
            "heard",
            match notice.means {
                Means::Rebalance => {
                    format!("{}: the machine may go away; a reason to save, not to leave", notice.source)
                }
                Means::Interruption => format!("{}: the machine goes away, {left}", notice.source),
                Means::Stop => format!("{}: asked to stop, {left}", notice.source),
            },
        );
    }
    match episode.how {
        How::Stopped => {}
        How::Vanished => line("ended", "without a word: killed, or cut off from the store".into()),
        How::WorkerDied => line("ended", "a worker died; the same machine carried on".into()),
    }
    if let Some(drain) = episode.drain {
        for moment in &drain.timeline {
            line(&format!("{:+9.2} s", moment.after_s), moment.what.clone());
        }
        let expected = match (carried_out(drain), drain.actual_s) {
            (Some((expected, Some(took))), _) => format!(
                ", expected to take {}, took {} ({})",
                human::seconds(expected),
                human::seconds(took),
                off(took / expected)
            ),
            (Some((expected, None)), _) => {
                format!(", expected to take {}, never was durable", human::seconds(expected))
            }
            (None, Some(actual)) => format!(", durable after {}", human::seconds(actual)),
            (None, None) => String::new(),
        };
        line("plan", format!("{}{expected}", words(drain.plan)));
    }
    if let Some(verdict) = episode.verdict {
        line("verdict", verdict.to_owned());
    }
    line(
        "lost",
        match episode.lost_steps {
            Some(0) => format!("nothing: {} is committed", step(episode.step)),
            Some(lost) => {
                format!("{} of {}, since {}", human::plural(lost, "step"), step(episode.step), step(episode.checkpoint))
            }
            None => format!("what was done after {}; nobody could say how much", step(episode.checkpoint)),
        },
    );
    line(
        "then",
        match &episode.next {
            Some(next) => format!(
                "{} later generation {} on node {}, from {}",
                human::seconds(next.away_s),
                next.generation,
                next.node,
                step(next.resume_step)
            ),
            None => "nobody has carried on yet".to_owned(),
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::history::tests::{committed, created, formed, state},
        journal::{Happened, Record},
    };

    /// Planned 100 s after the notice.
    fn drain(predicted_s: Option<f64>, actual_s: Option<f64>) -> Drain {
        Drain {
            source: "aws-spot".into(),
            deadline_s: Some(120.0),
            plan: DrainPlan::FullSave,
            reason: "20.0 s left".into(),
            planned_s: Some(100.0),
            predicted_s,
            actual_s,
            timeline: vec![
                Happened { after_s: 0.0, what: "aws-spot was heard, 120.0 s left".into() },
                Happened { after_s: 100.25, what: "all ranks stop after step 34".into() },
            ],
        }
    }

    fn story() -> RunState {
        let notice = |generation, source: &str, means, deadline_s| Record::Notice {
            generation: Generation(generation),
            source: source.into(),
            deadline_s,
            means,
        };
        state(vec![
            created(),
            formed(1, None, &[]),
            committed(10, 1),
            notice(1, "aws-rebalance", Means::Rebalance, None),
            notice(1, "aws-spot", Means::Interruption, Some(120.0)),
            Record::Interrupted {
                generation: Generation(1),
                step: Step(34),
                committed: Some(Step(34)),
                lost_steps: 0,
                verdict: "the last finished step is committed".into(),
                drain: Some(Box::new(drain(Some(104.0), Some(106.6)))),
            },
            // `formed` calls generation 2 a restart after a worker's death.
            formed(3, Some((10, 1)), &[]),
            committed(40, 3),
            formed(4, Some((40, 3)), &[]),
            Record::Completed { generation: Generation(4), step: Step(50), loss: 1.0 },
            formed(5, Some((40, 3)), &[("train.steps", "500")]),
        ])
    }

    #[test]
    fn each_interruption_is_told_with_what_it_cost() {
        let state = story();
        let episodes = episodes(&state);
        assert_eq!(
            text(&episodes, &total(&state, &episodes)),
            "\
run first: 2 interruptions, 0 steps lost (1 of unknown loss), 2m away

   1.         1970-01-12 13:51:40 UTC, generation 1 on node n1
   heard      aws-rebalance: the machine may go away; a reason to save, not to leave
   heard      aws-spot: the machine goes away, 2m left
       +0.00 s aws-spot was heard, 120.0 s left
     +100.25 s all ranks stop after step 34
   plan       save everything, expected to take 4.00 s, took 6.60 s (65 % off)
   verdict    the last finished step is committed
   lost       nothing: step 34 is committed
   then       60.0 s later generation 3 on node n1, from step 10

   2.         1970-01-12 13:53:40 UTC, generation 3 on node n1
   heard      nothing: there was no warning
   ended      without a word: killed, or cut off from the store
   lost       what was done after step 40; nobody could say how much
   then       60.0 s later generation 4 on node n1, from step 40
"
        );
    }

    #[test]
    fn a_run_that_is_at_work_or_completed_has_no_open_interruption() {
        let state = state(vec![created(), formed(1, None, &[]), committed(9, 1)]);
        let episodes = episodes(&state);
        assert_eq!(text(&episodes, &total(&state, &episodes)), "run first: no interruption\n");
    }

    #[test]
    fn what_was_lost_is_said_plainly() {
        let (generation, step, committed) = (Generation(1), Step(12), None);
        let state = state(vec![
            created(),
            formed(1, None, &[]),
            Record::Interrupted {
                generation,
                step,
                committed,
                lost_steps: 12,
                verdict: "no time".into(),
                drain: Some(Box::new(Drain { plan: DrainPlan::StopEarly, ..drain(Some(109.0), None) })),
            },
        ]);
        let episodes = episodes(&state);
        let told = text(&episodes, &total(&state, &episodes));
        for part in [
            "12 steps lost, 0 s away",
            "heard      aws-spot",
            "leave without a save, expected to take 9.00 s, never was durable",
            "lost       12 steps of step 12, since the beginning",
            "then       nobody has carried on yet",
        ] {
            assert!(told.contains(part), "{part:?} in\n{told}");
        }
        assert_eq!(episodes[0].prediction_error, None);
    }

    #[test]
    fn a_prediction_is_held_against_the_time_from_when_it_was_made() {
        let error = |drain: Drain| carried_out(&drain).and_then(|(expected, took)| Some(took? / expected - 1.0));
        // Two minutes announced, most of them trained in: a save of 0.2 s that takes 2 s is not "2 % off".
        let late = Drain { planned_s: Some(115.0), ..drain(Some(115.2), Some(117.0)) };
        assert!(error(late).is_some_and(|error| (error - 9.0).abs() < 1e-6));
        assert_eq!(error(Drain { planned_s: None, ..drain(Some(115.2), Some(117.0)) }), None, "nobody wrote down when");
        assert_eq!(error(drain(None, Some(117.0))), None);
        assert_eq!(error(drain(Some(100.0), Some(117.0))), None, "nothing was to be done");
        assert_eq!(
            (off(0.9), off(1.25), off(10.0)),
            ("10 % off".into(), "25 % off".into(), "10.0 times as long".into())
        );
    }
}
