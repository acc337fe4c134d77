//! The story of an interruption in words, line by line: what `trainer explain` prints and the report shows.

use super::{
    episodes::{Episode, How, carried_out},
    rosters::RosterView,
};
use crate::{
    ids::{NodeId, Step},
    journal::{DrainPlan, FormedReason, Means},
    report::human,
};

/// The lines of one interruption: a short name, and what it says. `number` is its place among all, from 1 on. Text from
/// outside is in them as it is: whoever shows it makes it fit for the place.
pub fn lines(number: usize, episode: &Episode<'_>) -> Vec<(String, String)> {
    let Episode { generation, node, nodes, at, .. } = episode;
    let step = |step: Option<Step>| step.map_or_else(|| "the beginning".to_owned(), |step| format!("step {step}"));
    let mut lines = Vec::new();
    let mut line = |name: &str, what: String| lines.push((name.to_owned(), what));
    let when = at.strftime("%Y-%m-%d %H:%M:%S UTC");
    line(&format!("{number}."), format!("{when}, generation {generation} {}", on(*nodes, node)));
    match episode.drain {
        _ if !episode.notices.is_empty() => {}
        // The store did not accept the notice's own record in time.
        Some(drain) => line("heard", drain.source.clone()),
        // Received between two generations, when there was nothing to save.
        None if episode.how == How::Stopped => {
            line("heard", "a request to stop; its source was not recorded".to_owned());
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
        How::Vanished => line("ended", "no final record: killed, or cut off from the store".into()),
        How::WorkerDied => line("ended", "a worker died; the same machine continued".into()),
        How::Regrouped => line("ended", "its group of machines changed; the others continued".into()),
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
                format!(", expected to take {}, never became durable", human::seconds(expected))
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
            None => format!("the steps after {}; their number is unknown", step(episode.checkpoint)),
        },
    );
    line(
        "then",
        match &episode.next {
            Some(next) => format!(
                "{} later generation {} {}, from {}",
                human::seconds(next.away_s),
                next.generation,
                on(next.nodes, next.node),
                step(next.resume_step)
            ),
            None => "not continued yet".to_owned(),
        },
    );
    lines
}

/// The nodes of a generation.
fn on(nodes: usize, leader: &NodeId) -> String {
    if nodes == 1 { format!("on node {leader}") } else { format!("on {nodes} nodes, led by {leader}") }
}

/// The error of a prediction: the actual time over the expected one.
pub fn off(ratio: f64) -> String {
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

/// Why a generation was formed.
pub fn why(roster: &RosterView<'_>) -> String {
    if let Some(why) = roster.why {
        return why.to_owned();
    }
    match (roster.continues, roster.reason) {
        (None, FormedReason::Started) => "started".to_owned(),
        (Some(before), FormedReason::Started) => format!("continues generation {before}"),
        (_, FormedReason::WorkerDied) => "a worker died".to_owned(),
        (_, FormedReason::NodeLost) => "a node was lost".to_owned(),
        (_, FormedReason::NodeLeft) => "a node left".to_owned(),
        (_, FormedReason::NodeJoined) => "a node joined".to_owned(),
    }
}
