//! An elastic group, simulated: it trains with any number of nodes from `min` to `max`, in lives of machines drawn at
//! random.
//!
//! The global batch stays, so a group of k of `max` nodes trains at k/`max` of the full speed. Whoever is lost leaves a
//! group that forms anew and trains on, if `min` are left; otherwise it waits. A loss without notice costs the training
//! since the newest durable save. Before an announced one all is saved, and the node that must go leaves. A node that
//! comes joins at the next commit, or at once if the group waits. Each change stops the group for `reform_s`; training
//! itself is lost only as said.
//!
//! A pure function of its input and seed. Next to nothing is approximated: the efficiency of shares that do not divide
//! the batch (91 % for 32 sequences on 5) is left out, and so is training within the pause of a save.

use serde::Serialize;

use super::{
    model::{Costs, Lives},
    replay::{Job, MOST_LIVES, MOST_REPLACED, MOST_SAVES, Seen, Trial, Unfinished, mean_of},
};
use crate::{goodput::Estimate, random::SplitMix64};

/// How a group follows its machines.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Elastic {
    /// The fewest nodes that train.
    pub min: u32,
    /// The most.
    pub max: u32,
    /// From a change of the group to its next step, seconds.
    pub reform_s: f64,
}

/// Machines with random lives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fleet {
    /// How long each lives.
    pub lives: Lives,
    /// Mean wait for a replacement, seconds.
    pub wait_s: f64,
    /// The share of losses that take all nodes.
    pub together: f64,
}

/// Simulates the job `trials` times; `job.nodes` is taken to be `elastic.max`. `policy` gives the training time until
/// the next save, seconds.
pub fn simulate_elastic(
    job: &Job,
    elastic: &Elastic,
    fleet: &Fleet,
    policy: impl Fn(&Seen) -> f64,
    trials: u32,
    seed: u64,
) -> Result<Estimate, Unfinished> {
    let job = Job { nodes: elastic.max, ..*job };
    mean_of(&job, trials, |trial| {
        let random = SplitMix64::named(seed, &format!("elastic machines of trial {trial}"));
        Play::new(&job, *elastic, *fleet, random).run(&policy)
    })
}

/// One machine, from its request on.
#[derive(Clone, Copy, Debug)]
struct Node {
    arrives_s: f64,
    /// It can train from here on.
    ready_s: f64,
    /// It leaves the group: at its end, or in time before it.
    leaves_s: f64,
    ends_s: f64,
    warned: bool,
    member: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Fewer than `min` nodes.
    Waits,
    /// The group forms until then.
    Forms(f64),
    Trains,
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Next {
    Leaves(usize),
    Ready,
    Formed,
    Order,
    Durable,
}

struct Play<'a> {
    job: &'a Job,
    elastic: Elastic,
    fleet: Fleet,
    random: SplitMix64,
    nodes: Vec<Node>,
    now: f64,
    state: State,
    /// Work in seconds at full speed: trained, and durable.
    trained_s: f64,
    kept_s: f64,
    /// The save in flight: its work, and when it counts.
    in_flight: Option<(f64, f64)>,
    /// Training pauses for a save until then.
    stalled_until: f64,
    /// When the next save is due, in time spent training.
    due_s: f64,
    /// Time spent training.
    up_s: f64,
    lossy: u64,
    /// Machines replaced since the group last formed.
    replaced: u32,
    trial: Trial,
}

impl<'a> Play<'a> {
    fn new(job: &'a Job, elastic: Elastic, fleet: Fleet, random: SplitMix64) -> Self {
        let mut play = Self {
            job,
            elastic,
            fleet,
            random,
            nodes: Vec::new(),
            now: 0.0,
            state: State::Waits,
            trained_s: 0.0,
            kept_s: 0.0,
            in_flight: None,
            stalled_until: 0.0,
            due_s: 0.0,
            up_s: 0.0,
            lossy: 0,
            replaced: 0,
            trial: Trial::default(),
        };
        play.nodes = (0..elastic.max).map(|_| play.replacement(0.0)).collect();
        play
    }

    fn replacement(&mut self, at: f64) -> Node {
        let arrives_s = at - self.fleet.wait_s * (1.0 - self.random.next_f64()).ln();
        let ends_s = arrives_s + self.fleet.lives.draw(self.random.next_f64(), self.random.next_f64());
        let notice = self.job.notice;
        let warned = self.random.next_f64() < notice.share && notice.fits(&self.job.costs);
        let leaves_s = if warned { (ends_s - notice.reserve_s(&self.job.costs)).max(arrives_s) } else { ends_s };
        let ready_s = arrives_s + self.job.costs.restart_s;
        Node { arrives_s, ready_s, leaves_s, ends_s, warned, member: false }
    }

    fn members(&self) -> u32 {
        self.nodes.iter().map(|node| u32::from(node.member)).sum()
    }

    fn speed(&self) -> f64 {
        f64::from(self.members()) / f64::from(self.elastic.max)
    }

    fn seen(&self) -> Seen {
        Seen { saves: self.trial.saves, up_s: self.up_s, lossy: self.lossy }
    }

    /// The next event, and when.
    fn next(&self) -> (f64, Next) {
        let mut next = (f64::INFINITY, Next::Formed);
        let mut consider = |at: f64, what: Next| {
            if at < next.0 {
                next = (at, what);
            }
        };
        for (index, node) in self.nodes.iter().enumerate() {
            consider(node.leaves_s, Next::Leaves(index));
            if !node.member && node.ready_s > self.now {
                consider(node.ready_s, Next::Ready);
            }
        }
        if let Some((_, durable_at)) = self.in_flight {
            consider(durable_at, Next::Durable);
        }
        match self.state {
            State::Waits => {}
            State::Forms(until) => consider(until, Next::Formed),
            State::Trains => {
                let from = self.now.max(self.stalled_until);
                let done = (self.job.work_s - self.trained_s).max(0.0) / self.speed();
                let due = (self.due_s - self.up_s).max(0.0);
                // One save in flight at a time; the last one is ordered when the work is done.
                let order = if self.in_flight.is_some() { f64::INFINITY } else { from + due.min(done) };
                consider(order, Next::Order);
            }
        }
        next
    }

    /// Time passes: whoever trains, trains.
    fn pass(&mut self, until: f64) {
        if self.state == State::Trains {
            let time = (until - self.now.max(self.stalled_until)).max(0.0);
            let left = (self.job.work_s - self.trained_s).max(0.0);
            let work = (time * self.speed()).min(left);
            self.trained_s += work;
            self.trial.trained_s += work;
            self.up_s += time;
        }
        self.now = until;
    }

    fn run(mut self, policy: &impl Fn(&Seen) -> f64) -> Result<Trial, Unfinished> {
        self.due_s = policy(&self.seen());
        loop {
            let (at, next) = self.next();
            if !at.is_finite() {
                return Err(Unfinished::NoMachines);
            }
            self.pass(at.max(self.now));
            match next {
                Next::Leaves(index) => self.leaves(index),
                Next::Ready => self.ready(),
                Next::Formed => (self.state, self.replaced) = (State::Trains, 0),
                Next::Order => self.order(policy),
                Next::Durable => {
                    if let Some((work, _)) = self.in_flight.take() {
                        self.kept_s = work;
                    }
                    if self.kept_s >= self.job.work_s {
                        return Ok(self.ended());
                    }
                    self.join();
                }
            }
            if self.replaced > MOST_REPLACED {
                return Err(Unfinished::NoMachines);
            }
            if self.trial.interruptions > MOST_LIVES {
                return Err(Unfinished::Lives);
            }
            if self.trial.saves > MOST_SAVES {
                return Err(Unfinished::Saves);
            }
        }
    }

    fn order(&mut self, policy: &impl Fn(&Seen) -> f64) {
        let Costs { stall_s, .. } = self.job.costs;
        self.trial.saves += 1;
        self.in_flight = Some((self.trained_s, self.now + self.job.costs.committed_after_s()));
        self.stalled_until = self.now + stall_s;
        self.due_s = self.up_s + policy(&self.seen());
    }

    /// A node is lost, or leaves in time.
    fn leaves(&mut self, index: usize) {
        let was_member = self.nodes[index].member;
        let warned = self.nodes[index].warned;
        let together = self.nodes.len() > 1 && was_member && self.random.next_f64() < self.fleet.together;
        let ends_s = self.nodes[index].ends_s;
        for other in 0..self.nodes.len() {
            if other == index || (together && self.nodes[other].arrives_s <= self.now) {
                self.pays(other, ends_s);
                self.nodes[other] = self.replacement(ends_s);
                self.replaced += 1;
            }
        }
        if !was_member {
            return;
        }
        // A node that only waits for others is no loss.
        if self.state != State::Waits {
            self.trial.interruptions += 1;
            self.lossy += u64::from(!warned);
        }
        let pause = if warned {
            self.kept_s = self.trained_s;
            self.elastic.reform_s + self.job.costs.committed_after_s()
        } else {
            self.trial.lost_s += self.trained_s - self.kept_s;
            self.trained_s = self.kept_s;
            self.elastic.reform_s
        };
        self.in_flight = None;
        self.form(pause);
    }

    /// A machine is ready: it joins at the next commit, or at once if nobody trains.
    fn ready(&mut self) {
        if self.state == State::Waits {
            self.join();
        }
    }

    /// All that are ready join.
    fn join(&mut self) {
        let now = self.now;
        let mut joined = false;
        for node in self.nodes.iter_mut().filter(|node| !node.member && node.ready_s <= now) {
            (node.member, joined) = (true, true);
        }
        if joined {
            self.form(self.elastic.reform_s);
        }
    }

    /// The group forms with its members, if they are enough.
    fn form(&mut self, pause_s: f64) {
        let enough = self.members() >= self.elastic.min;
        self.state = if enough { State::Forms(self.now + pause_s) } else { State::Waits };
        if !enough {
            // Those who wait for the others form with whoever comes.
            let now = self.now;
            for node in self.nodes.iter_mut().filter(|node| node.ready_s <= now) {
                node.member = true;
            }
            if self.members() >= self.elastic.min {
                self.state = State::Forms(self.now + pause_s);
            }
        }
    }

    fn pays(&mut self, index: usize, until: f64) {
        self.trial.paid_node_s += (until - self.nodes[index].arrives_s).max(0.0);
    }

    fn ended(mut self) -> Trial {
        for index in 0..self.nodes.len() {
            self.pays(index, self.now.min(self.nodes[index].ends_s));
        }
        self.trial.wall_s = self.now;
        self.trial
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::goodput::{Gang, Notice, simulate};

    const HOUR: f64 = 3600.0;
    const COSTS: Costs = Costs { stall_s: 1.0, durable_s: 20.0, restart_s: 120.0 };

    fn job(nodes: u32, notice: Notice) -> Job {
        Job { work_s: 200.0 * HOUR, nodes, costs: COSTS, notice }
    }

    fn fleet(mean_s: f64, together: f64) -> Fleet {
        Fleet { lives: Lives::exponential(mean_s), wait_s: 600.0, together }
    }

    fn elastic(job: &Job, min: u32, max: u32, reform_s: f64, fleet: &Fleet) -> Estimate {
        simulate_elastic(job, &Elastic { min, max, reform_s }, fleet, |_| 300.0, 40, 7).unwrap()
    }

    /// One node is never elastic: the same losses and the same goodput as in the replay of one machine. Seed 7.
    #[test]
    fn one_node_is_a_gang_of_one() {
        for notice in [Notice::NONE, Notice { share: 0.6, lead_s: 120.0 }] {
            let (job, fleet) = (job(1, notice), fleet(5.0 * HOUR, 0.0));
            let found = elastic(&job, 1, 1, 0.0, &fleet);
            let gang = |trial| Gang::new(fleet.lives, 1, fleet.wait_s, 0.0, 50 + u64::from(trial));
            let played = simulate(&job, |_| 300.0, gang, 40, 7).unwrap();
            assert!((found.goodput / played.goodput - 1.0).abs() < 0.01, "{found:?} {played:?}");
            assert!((found.wall_s / played.wall_s - 1.0).abs() < 0.03, "{found:?} {played:?}");
            assert!((found.interruptions / played.interruptions - 1.0).abs() < 0.06, "{found:?} {played:?}");
        }
    }

    /// A group that may not shrink waits for replacements as a gang does. A gang's restart comes after the last
    /// arrival, here each machine's after its own: it can only be faster. Seed 7.
    #[test]
    fn a_group_that_may_not_shrink_is_a_gang() {
        let (job, fleet) = (job(4, Notice::NONE), fleet(20.0 * HOUR, 0.3));
        let found = elastic(&job, 4, 4, 120.0, &fleet);
        let gang = |trial| Gang::new(fleet.lives, 4, fleet.wait_s, fleet.together, 50 + u64::from(trial));
        let played = simulate(&job, |_| 300.0, gang, 40, 7).unwrap();
        assert!((found.wall_s / played.wall_s - 1.0).abs() < 0.06, "{found:?} {played:?}");
        assert!((found.lost_s / played.lost_s - 1.0).abs() < 0.15, "{found:?} {played:?}");
    }

    /// Whoever may train on with fewer is done earlier and pays less for waiting. Seed 7.
    #[test]
    fn a_group_that_may_shrink_is_done_earlier() {
        let (job, fleet) = (job(4, Notice::NONE), Fleet { wait_s: 2.0 * HOUR, ..fleet(10.0 * HOUR, 0.0) });
        let [rigid, loose] = [4, 1].map(|min| elastic(&job, min, 4, 20.0, &fleet));
        assert!(loose.wall_s < 0.8 * rigid.wall_s && loose.goodput > 1.1 * rigid.goodput, "{loose:?} {rigid:?}");
        let slow = elastic(&job, 1, 4, 600.0, &fleet);
        assert!(slow.goodput < loose.goodput && slow.wall_s > loose.wall_s, "forming costs time: {slow:?}");
    }

    #[test]
    fn announced_losses_lose_no_training() {
        let fleet = fleet(5.0 * HOUR, 0.0);
        let all = elastic(&job(3, Notice { share: 1.0, lead_s: 120.0 }), 1, 3, 20.0, &fleet);
        let none = elastic(&job(3, Notice::NONE), 1, 3, 20.0, &fleet);
        assert!(all.lost_s == 0.0 && none.lost_s > 0.0 && all.goodput > none.goodput, "{all:?} {none:?}");
    }

    /// Machines that stay pay for the saves, one restart, one forming and nothing else.
    #[test]
    fn machines_that_stay_train_at_full_speed() {
        let calm = Fleet { wait_s: 0.0, ..fleet(1e15, 0.0) };
        let found = elastic(&job(4, Notice::NONE), 2, 4, 20.0, &calm);
        let work_s = 200.0 * HOUR;
        let expected = 120.0 + 20.0 + work_s + (work_s / 300.0 - 1.0) * 1.0 + 20.0;
        assert!((found.wall_s - expected).abs() < 2.0, "{found:?} instead of {expected}");
        assert_eq!((found.interruptions, found.lost_s, found.paid_node_s), (0.0, 0.0, 4.0 * found.wall_s));
    }

    #[test]
    fn jobs_that_cannot_end_are_given_up() {
        let job = job(4, Notice::NONE);
        let run = |lives, min| {
            let fleet = Fleet { lives, wait_s: 1.0, together: 0.0 };
            simulate_elastic(&job, &Elastic { min, max: 4, reform_s: 20.0 }, &fleet, |_| 300.0, 1, 1)
        };
        // Hardly any machine lives as long as its start takes, or long enough for a save.
        assert_eq!(run(Lives::exponential(1.0), 1), Err(Unfinished::NoMachines));
        assert_eq!(run(Lives::exponential(60.0), 1), Err(Unfinished::Lives));
    }
}
