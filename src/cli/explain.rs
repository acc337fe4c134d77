//! `trainer explain`

use std::{fmt::Write, process::ExitCode};

use clap::Args;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg},
    output, store,
};
use crate::{
    error::Result,
    history::{
        self,
        episodes::{Episode, Total, episodes, total},
        rosters::{RosterView, rosters},
        story,
    },
    journal::{EarlyStop, Reached, RunState},
    rendezvous::{
        cost::{Requests, a_day, usd_a_day},
        membership::Role,
    },
    report::human,
    workload::words,
};

/// Explain each interruption: which notice came, what was done, what it cost; and who came and went
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer explain --run-id first
  trainer explain --run-id first --json | jq 'select(.lost_steps > 0)'

All figures come from the run's journal.
Times within one interruption come from one machine's monotonic clock.
Times between machines are differences of their wall clocks.")]
pub struct Explain {
    #[command(flatten)]
    pub(super) run: RunArg,
    #[command(flatten)]
    json: JsonArg,
}

impl Explain {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let (state, is_local) = store::block_on(async {
            let root = self.run.store.open()?;
            Ok((history::read(&root, &self.run.run_id).await?, root.is_local()))
        })?;
        let episodes = episodes(&state);
        let total = total(&state, &episodes);
        let group = Group::of(&state, is_local);
        let text = if self.json.json {
            let mut text = output::json_lines(&episodes)?;
            let (early, cap) = (history::early(&state), state.capped());
            text.push_str(&output::json_lines([&Summary { total: &total, group: group.as_ref(), early, cap }])?);
            text
        } else {
            let mut text = text(&episodes, &total);
            text.push_str(&group.map(|group| group.text()).unwrap_or_default());
            text.push_str(&ended(&state));
            text
        };
        output::emit(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The last line of `--json`.
#[derive(Debug, Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    total: &'a Total<'a>,
    /// Of a run with several nodes.
    #[serde(flatten)]
    group: Option<&'a Group<'a>>,
    /// Why the run is complete before its last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    early: Option<EarlyStop>,
    /// The cap that it has reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    cap: Option<Reached>,
}

/// Why a run has ended before its last step, if it is complete or at its cap; and what makes it go on.
fn ended(state: &RunState) -> String {
    if let (Some(cap), Some(step)) = (state.capped(), history::last_step(state)) {
        let (run_id, remedy) = (state.run_id(), cap.remedy());
        return format!(
            "\nat its cap after step {step}: {cap}\n   to go on: trainer resume --run-id {run_id} {remedy}\n"
        );
    }
    let early = history::early(state).zip(history::last_step(state));
    early.map_or_else(String::new, |(early, step)| {
        format!("\nstopped early after step {step}: {early}\n   {}\n", words::stops_later(&early))
    })
}

/// The nodes of a run with several.
#[derive(Debug, Serialize)]
struct Group<'a> {
    /// The nodes of each generation, the oldest first.
    generations: Vec<RosterView<'a>>,
    /// What the newest generation's standing requests cost; `None`: the store is in this machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    requests: Option<StandingRequests>,
}

/// The standing requests of a generation of several nodes, at the prices of S3.
#[derive(Debug, Serialize)]
struct StandingRequests {
    nodes: u32,
    /// Of the leader, while it has room for more nodes.
    leader_requests_a_day: u64,
    leader_usd_a_day: f64,
    /// Of each other node.
    follower_requests_a_day: u64,
    follower_usd_a_day: f64,
    /// Of all nodes together.
    usd_a_day: f64,
}

impl StandingRequests {
    fn of(nodes: usize) -> Self {
        let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
        let (leader, follower) = (a_day(Role::Leader, false), a_day(Role::Follower, false));
        let count = |Requests { put, list, head, get }| put + list + head + get;
        Self {
            nodes,
            leader_requests_a_day: count(leader),
            leader_usd_a_day: leader.usd(),
            follower_requests_a_day: count(follower),
            follower_usd_a_day: follower.usd(),
            usd_a_day: usd_a_day(nodes, false),
        }
    }

    fn text(&self) -> String {
        format!(
            "the leader makes {} requests a day on S3 ({:.3} USD), another node {} ({:.3} USD); {} cost {:.2} USD a \
             day",
            self.leader_requests_a_day,
            self.leader_usd_a_day,
            self.follower_requests_a_day,
            self.follower_usd_a_day,
            human::plural(self.nodes.into(), "node"),
            self.usd_a_day,
        )
    }
}

impl<'a> Group<'a> {
    /// `None`: it is a run of one node.
    fn of(state: &'a RunState, is_local: bool) -> Option<Self> {
        let generations = rosters(state);
        let nodes = generations.last()?.nodes;
        Some(Self { generations, requests: (!is_local).then(|| StandingRequests::of(nodes)) })
    }

    fn text(&self) -> String {
        let mut text = "\nnodes\n".to_owned();
        let mut line = |name: &str, what: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "   {name:<10} {}", human::plain(&what));
        };
        for roster in &self.generations {
            let RosterView { generation, at, leader, nodes, workers, .. } = roster;
            let (nodes, workers) =
                (human::plural(*nodes as u64, "node"), human::plural(workers.get().into(), "worker"));
            let when = at.strftime("%Y-%m-%d %H:%M:%S UTC");
            line(
                &format!("{generation}."),
                format!("{when}, {nodes} with {workers}, led by {leader}: {}", story::why(roster)),
            );
            for gone in roster.gone {
                line("gone", format!("{}: {}", gone.node, gone.why));
            }
            let joined: Vec<&str> = roster.joined.iter().map(|node| node.as_str()).collect();
            if !joined.is_empty() {
                line("joined", joined.join(", "));
            }
        }
        if let Some(requests) = &self.requests {
            line("requests", requests.text());
        }
        text
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
            let is_open = episodes.last().is_some_and(|episode| episode.next.is_none());
            let away = match (is_open, human::seconds(total.away_s)) {
                (false, away) => format!("{away} away"),
                (true, _) if total.away_s == 0.0 => "still away".to_owned(),
                (true, away) => format!("{away} away before, and still away"),
            };
            writeln!(
                text,
                "run {}: {}, {} lost{more}, {away}",
                total.run_id,
                human::plural(count as u64, "interruption"),
                human::plural(total.lost_steps, "step"),
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
    for (name, what) in story::lines(number, episode) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "   {name:<10} {}", human::plain(&what));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        history::{
            episodes::carried_out,
            tests::{changed, committed, created, formed, group, state},
        },
        ids::{Generation, Step},
        journal::{Drain, DrainPlan, FormedReason, Happened, Means, Record},
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
                cap: None,
            },
            // `formed` calls generation 2 a restart after a worker's death.
            formed(3, Some((10, 1)), &[]),
            committed(40, 3),
            formed(4, Some((40, 3)), &[]),
            Record::Completed { generation: Generation(4), step: Step(50), loss: Some(1.0), early: None },
            formed(5, Some((40, 3)), &[("train.steps", "500")]),
        ])
    }

    #[test]
    fn each_interruption_is_explained_with_its_cost() {
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
   ended      no final record: killed, or cut off from the store
   lost       the steps after step 40; their number is unknown
   then       60.0 s later generation 4 on node n1, from step 40
"
        );
    }

    #[test]
    fn who_came_and_went_is_told_of_a_run_with_several_nodes() {
        let mut left = changed(group(3, Some(2), &[("b", 2), ("d", 1)]), &[("c", "it left")], &[]);
        if let Record::Formed { reason, .. } = &mut left {
            *reason = FormedReason::NodeLeft;
        }
        let state = state(vec![
            created(),
            group(1, None, &[("a", 2), ("b", 2)]),
            changed(group(2, Some(1), &[("b", 2), ("c", 1), ("d", 1)]), &[("a", "it does not answer")], &["c", "d"]),
            left,
        ]);
        let group = Group::of(&state, false).unwrap();
        assert_eq!(
            group.text(),
            "
nodes
   1.         1970-01-12 13:47:40 UTC, 2 nodes with 4 workers, led by a: started
   2.         1970-01-12 13:48:40 UTC, 3 nodes with 4 workers, led by b: a node was lost
   gone       a: it does not answer
   joined     c, d
   3.         1970-01-12 13:49:40 UTC, 2 nodes with 3 workers, led by b: a node left
   gone       c: it left
   requests   the leader makes 64800 requests a day on S3 (0.165 USD), another node 4320 (0.015 USD); 2 nodes cost \
0.18 USD a day
"
        );
        let episodes = episodes(&state);
        let summary = Summary { total: &total(&state, &episodes), group: Some(&group), early: None, cap: None };
        let json: serde_json::Value = serde_json::from_str(&output::json_lines([&summary]).unwrap()).unwrap();
        assert_eq!((&json["run_id"], &json["interruptions"]), (&"first".into(), &2.into()));
        let second = &json["generations"][1];
        assert_eq!((&second["leader"], &second["nodes"], &second["workers"]), (&"b".into(), &3.into(), &4.into()));
        assert_eq!((&second["continues"], &second["reason"]), (&1.into(), &"node_lost".into()));
        assert_eq!(second["gone"][0]["why"], "it does not answer");
        assert_eq!(
            (&json["requests"]["nodes"], &json["requests"]["leader_requests_a_day"]),
            (&2.into(), &64_800.into())
        );
        let told = super::text(&episodes, &total(&state, &episodes));
        for part in [
            "generation 1 on 2 nodes, led by a\n",
            "ended      its group of machines changed; the others continued\n",
            "later generation 2 on 3 nodes, led by b, from the beginning\n",
        ] {
            assert!(told.contains(part), "{part:?} in\n{told}");
        }
        assert!(Group::of(&state, true).unwrap().requests.is_none(), "a folder costs nothing");
    }

    #[test]
    fn a_run_of_one_node_is_explained_as_ever() {
        let state = story();
        let (episodes, group) = (episodes(&state), Group::of(&state, false));
        let total = total(&state, &episodes);
        assert!(group.is_none());
        let summary = output::json_lines([&Summary { total: &total, group: None, early: None, cap: None }]).unwrap();
        assert_eq!(summary, output::json_lines([&total]).unwrap());
        assert_eq!(
            summary,
            "{\"run_id\":\"first\",\"interruptions\":2,\"lost_steps\":0,\"unknown\":1,\"away_s\":120.0}\n"
        );
    }

    #[test]
    fn a_run_that_is_at_work_or_completed_has_no_open_interruption() {
        let state = state(vec![created(), formed(1, None, &[]), committed(9, 1)]);
        let episodes = episodes(&state);
        assert_eq!(text(&episodes, &total(&state, &episodes)), "run first: no interruption\n");
    }

    #[test]
    fn losses_are_stated_plainly() {
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
                cap: None,
            },
        ]);
        let episodes = episodes(&state);
        let told = text(&episodes, &total(&state, &episodes));
        for part in [
            "12 steps lost, still away",
            "heard      aws-spot",
            "leave without a save, expected to take 9.00 s, never became durable",
            "lost       12 steps of step 12, since the beginning",
            "then       not continued yet",
        ] {
            assert!(told.contains(part), "{part:?} in\n{told}");
        }
        assert_eq!(episodes[0].prediction_error, None);
    }

    #[test]
    fn a_prediction_is_compared_with_the_time_since_it_was_made() {
        let error = |drain: Drain| carried_out(&drain).and_then(|(expected, took)| Some(took? / expected - 1.0));
        // Two minutes announced, most of them trained in: a save of 0.2 s that takes 2 s is not "2 % off".
        let late = Drain { planned_s: Some(115.0), ..drain(Some(115.2), Some(117.0)) };
        assert!(error(late).is_some_and(|error| (error - 9.0).abs() < 1e-6));
        assert_eq!(error(Drain { planned_s: None, ..drain(Some(115.2), Some(117.0)) }), None, "nobody wrote down when");
        assert_eq!(error(drain(None, Some(117.0))), None);
        assert_eq!(error(drain(Some(100.0), Some(117.0))), None, "nothing was to be done");
        assert_eq!(
            (story::off(0.9), story::off(1.25), story::off(10.0)),
            ("10 % off".into(), "25 % off".into(), "10.0 times as long".into())
        );
    }
}
