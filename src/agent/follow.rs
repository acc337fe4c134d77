//! A generation on a node that does not lead it: its workers, its slots and its files, as the leader orders.
//!
//! [`run`] starts this node's workers and loads their state by itself, since the `formed` record says which; from there
//! on it relays. What the leader orders goes to the [`Node`], what comes back goes to the leader. It decides nothing
//! but when its own part is over: when the leader says so, when the leader is lost, when a newer generation stands, or
//! when this node must leave and the leader does not answer in time.
//!
//! Owns: the relay. The messages are in [`super::group`].
//!
//! *Crash:* the leader's link to this node breaks, and it ends the generation. *Retry:* none; the group forms anew.
//! *Cancel:* it ends as any end: workers gone, slots left for the next generation.

use std::time::Duration;

use tokio::{sync::mpsc, time::Instant};

use super::{
    blame::{self, Blame, Watch},
    drain::timeline::Signals,
    effects::{self, Answers, Order},
    finish::{self, FINISHING, Ordered},
    generation::Plan,
    group::{NoticeOfMember, ToLeader, ToMember},
    keep::Kept,
    node::{Node, Part},
    pace::{self, Pace},
    phase::{Event, Incoming},
    save::{gather::Fetched, put::Put, slots::Slots},
    states,
    workers::WorkerEvent,
};
use crate::{
    checkpoint::save::Receipt,
    error::{Error, Kind, Result},
    ids::{Step, WorldSize},
    notice::{self, Notice, Notices},
    protocol::{FromWorker, ToWorker},
    report::{self, Reporter},
    snapshot::plan::TensorSpec,
};

/// The time before a deadline at which a node that must leave gives its leader up: its process must also exit.
const EXITING: Duration = Duration::from_secs(1);
/// How long a node that was asked to leave, without a deadline, waits for its leader to end the generation.
const PATIENCE: Duration = Duration::from_secs(600);

/// What the channel brings of the leader.
#[derive(Debug)]
pub enum LeaderHeard {
    /// It said this.
    Said(ToMember),
    /// It is lost, and why.
    Parted(String),
    /// A newer generation stands: this one is nobody's any more.
    Overtaken,
}

/// The channel to the leader.
#[derive(Debug)]
pub struct Leader {
    /// What is sent to it.
    pub to: mpsc::UnboundedSender<ToLeader>,
    /// What it says.
    pub heard: mpsc::UnboundedReceiver<LeaderHeard>,
}

/// How this node's part of a generation ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Followed {
    /// The leader ended the generation. The journal, or the next one, says why.
    Over {
        /// This node was told to leave.
        leaving: bool,
        /// A person asked the run to stop: no node goes on.
        ends_the_run: bool,
        /// The leader hands over, and why.
        hands_over: Option<String>,
        /// This node's saves fail, and others' do not: it is left out, and why.
        unfit: Option<String>,
        /// The last step that this node's workers finished.
        finished: Step,
    },
    /// The leader is lost, or another one leads.
    CutOff {
        /// Why.
        why: String,
        /// The last step that this node's workers finished.
        finished: Step,
    },
    /// This node had to leave, and could not wait for the leader.
    Left {
        /// The last step that this node's workers finished.
        finished: Step,
    },
}

struct Follower<'a> {
    node: Node<'a>,
    incoming: Incoming,
    to: mpsc::UnboundedSender<ToLeader>,
    /// The states that this node's workers have reported; `None`: they were passed on.
    built: Option<Vec<TensorSpec>>,
    missing: u32,
    device: Option<String>,
    says: mpsc::UnboundedSender<Put>,
    /// The save ordered last, unless it was given up.
    ordered: Option<Ordered>,
    /// Its slot.
    slot: u8,
    /// How this node's part of it ended; `None`: it has not.
    put: Option<bool>,
    /// When it goes, whatever the leader says, since it was told to leave.
    leaving: Option<Instant>,
    /// The generation's begin.
    began: Instant,
    signals: Signals,
    /// Listens to this node's workers.
    watch: Watch<'a>,
    /// The steps of this generation and those before it.
    pace: &'a mut Pace,
    world: WorldSize,
    /// This node leaves when the generation is over, and why.
    blamed: Option<String>,
    /// The leader hands over, and why.
    hands_over: Option<String>,
    /// This node's saves fail, and others' do not.
    unfit: Option<String>,
    /// Why this machine can't take part: starting again will not help.
    broken: Option<Error>,
}

/// Runs this node's part of a generation to its end. Its workers are given back if they may go on in the next one.
pub async fn run(
    mut start: Plan,
    leader: Leader,
    slots: &mut Slots,
    notices: &mut Notices,
    reporter: &Reporter,
    blame: &mut Blame,
    pace: &mut Pace,
) -> Result<(Followed, Option<Kept>)> {
    let Leader { to, mut heard } = leader;
    let (senders, mut answers) = effects::channels();
    let crew = start.crew(slots, &senders.workers)?;
    let mut node = Node::begin(&start, slots, crew)?;
    let incoming = node.load(senders.fetched.clone())?;
    let (says, mut puts) = mpsc::unbounded_channel();
    let missing = start.upload.ranks.workers;
    let mut follower = Follower {
        node,
        incoming,
        to,
        built: None,
        missing,
        device: None,
        says,
        ordered: None,
        slot: 0,
        put: None,
        leaving: None,
        began: Instant::now(),
        signals: Signals::default(),
        watch: Watch::new(blame, start.load.step()),
        pace,
        world: start.upload.ranks.world,
        blamed: None,
        hands_over: None,
        unfit: None,
        broken: None,
    };
    let followed = loop {
        tokio::select! {
            biased;
            notice = notices.next() => {
                if follower.on_notice(&notice, reporter) {
                    break Followed::Left { finished: follower.watch.finished() };
                }
            }
            event = answers.next() => {
                follower.answer(event, &mut answers);
                if let Some(error) = follower.broken.take() {
                    follower.end(false).await?;
                    return Err(error);
                }
            }
            Some(put) = puts.recv() => follower.put(put),
            word = heard.recv() => match word {
                Some(LeaderHeard::Said(ToMember::Over { dismisses, ends_the_run, stay })) => {
                    follower.hear_the_dead(&mut answers).await;
                    let (leaving, finished) = (follower.leaving.is_some(), follower.watch.finished());
                    let (hands_over, unfit) = (follower.hands_over.take(), follower.unfit.take());
                    let blamed = follower.blamed.take();
                    let stays = !leaving && unfit.is_none() && blamed.is_none() && stay.contains(&start.upload.node);
                    let kept = if stays { follower.node.keeps_workers() } else { None };
                    if let Some(until) = follower.leaving {
                        let lending = follower.node.lends(&stay);
                        let _ = follower.node.ends_workers(dismisses).await;
                        if let Some(lending) = lending {
                            // Its process ends soon. Somebody may want it sooner, and says so again.
                            tokio::select! {
                                () = lending => {}
                                _ = notices.next() => {}
                                () = tokio::time::sleep_until(until) => {}
                            }
                        }
                    }
                    follower.end(dismisses).await?;
                    if let Some(why) = blamed.filter(|_| !leaving && !ends_the_run) {
                        return Err(blame::leaves(&why));
                    }
                    return Ok((Followed::Over { leaving, ends_the_run, hands_over, unfit, finished }, kept));
                }
                Some(LeaderHeard::Said(ToMember::Wrong { why })) => {
                    follower.end(false).await?;
                    return Err(states::wrong(&why));
                }
                Some(LeaderHeard::Said(order)) => follower.obey(order)?,
                Some(LeaderHeard::Parted(why)) => break Followed::CutOff { why, finished: follower.watch.finished() },
                Some(LeaderHeard::Overtaken) | None => {
                    let why = "another generation stands".to_owned();
                    break Followed::CutOff { why, finished: follower.watch.finished() };
                }
            },
            () = follower.must_leave() => break Followed::Left { finished: follower.watch.finished() },
        }
    };
    if matches!(followed, Followed::CutOff { .. }) {
        follower.kill();
        // A notice that comes meanwhile is heard: the checkpoint is worth more than this node's last seconds, and no
        // more than those.
        let until = follower.leaving;
        let (mut heard_one, limit) = (None, Instant::now() + FINISHING);
        let finished = {
            let finishing = follower.finish(&start, &mut puts);
            tokio::pin!(finishing);
            let mut until = until.unwrap_or(limit).min(limit);
            loop {
                tokio::select! {
                    biased;
                    notice = notices.next() => {
                        let left = notice.deadline.filter(|_| notice.deadline_binds());
                        until = left.map_or(until, |left| until.min(Instant::now() + left.saturating_sub(EXITING)));
                        heard_one = Some(notice);
                    }
                    done = &mut finishing => break Ok(done),
                    () = tokio::time::sleep_until(until) => break Err(()),
                }
            }
        };
        if let Some(notice) = heard_one {
            let _ = follower.on_notice(&notice, reporter);
        }
        match finished {
            Ok(Ok(Some(step))) => tracing::info!(%step, "the leader was lost before it had committed this save: done"),
            Ok(Ok(None)) => {}
            Ok(Err(error)) => tracing::info!(%error, "the lost leader's save could not be finished"),
            Err(()) => tracing::info!("the lost leader's save was not finished in time"),
        }
    }
    follower.hear_the_dead(&mut answers).await;
    let (leaves, finished, blamed) = (follower.leaving.is_some(), follower.watch.finished(), follower.blamed.take());
    follower.end(false).await?;
    if let Some(why) = blamed.filter(|_| !leaves) {
        return Err(blame::leaves(&why));
    }
    Ok((if leaves { Followed::Left { finished } } else { followed }, None))
}

impl Follower<'_> {
    /// A notice to this node. `true`: it leaves at once.
    fn on_notice(&mut self, notice: &Notice, reporter: &Reporter) -> bool {
        let deadline_s = notice.deadline.map(|left| left.as_secs_f64());
        let (source, means, binding) = (notice.source.to_owned(), notice.kind.name(), notice.deadline_binds());
        reporter.event(&report::Event::Notice { source, deadline_s, means, binding });
        if notice.kind == notice::Kind::Rebalance {
            return false;
        }
        if self.signals.hear(notice, self.began.elapsed()) {
            return true;
        }
        let left = notice.deadline.filter(|_| notice.deadline_binds()).map(|left| left.saturating_sub(EXITING));
        let until = Instant::now() + left.unwrap_or(PATIENCE);
        let until = self.leaving.map_or(until, |before| before.min(until));
        self.leaving = Some(until);
        self.say(ToLeader::Notice(NoticeOfMember::of(notice)));
        false
    }

    async fn must_leave(&self) {
        match self.leaving {
            Some(until) => tokio::time::sleep_until(until).await,
            None => std::future::pending().await,
        }
    }

    fn say(&self, words: ToLeader) {
        // A channel that is closed has ended, which is heard.
        let _ = self.to.send(words);
    }

    /// An event of this node, and all that have come with it.
    fn answer(&mut self, first: Event, answers: &mut Answers) {
        let mut said = Vec::new();
        let mut next = Some(first);
        while let Some(event) = next {
            match event {
                Event::Worker(WorkerEvent::Message(_, FromWorker::Built { tensors, device, parameters })) => {
                    self.is_built(tensors, device, parameters);
                }
                Event::Worker(event) => {
                    if let WorkerEvent::Message(_, FromWorker::Step(report)) = &event
                        && report.step > self.watch.finished()
                    {
                        self.pace.step(report.step_s);
                    }
                    if let Some(why) = self.watch.hears(&event) {
                        // Before the death itself: the leader may end the generation at once.
                        self.say(ToLeader::Blamed { why: why.clone() });
                        self.blamed = Some(why);
                    }
                    if let WorkerEvent::Message(rank, FromWorker::Failed { message, hint, permanent: true }) = &event {
                        let error = Error::new(Kind::Config, format!("worker {rank}: {message}"));
                        self.broken = Some(match hint {
                            Some(hint) => error.with_hint(hint),
                            None => error,
                        });
                    }
                    said.push(event);
                }
                Event::Fetched(Ok(fetched)) => {
                    let Fetched { bytes, stored, lent, seconds } = fetched;
                    self.say(ToLeader::Fetched { bytes, stored, lent, seconds });
                }
                Event::Fetched(Err(error)) => self.say(ToLeader::NotFetched { why: error.to_string() }),
                Event::Lost(error) => self.say(ToLeader::Failed(error.to_string())),
                Event::LaidOut { bytes } => self.say(ToLeader::LaidOut { bytes }),
                Event::Notice(_) | Event::Save(_) | Event::Retry { .. } | Event::HeldUp { .. } | Event::Tick => {}
            }
            next = answers.ready();
        }
        if !said.is_empty() {
            self.say(ToLeader::Workers(said));
        }
    }

    /// A worker has built its state. It is passed on once, when all of this node's workers have the same.
    fn is_built(&mut self, tensors: Vec<TensorSpec>, device: String, parameters: u64) {
        let device = self.device.get_or_insert(device).clone();
        match &self.built {
            Some(first) if *first != tensors => {
                return self.say(ToLeader::Failed("its ranks differ in their state".to_owned()));
            }
            Some(_) => {}
            None => self.built = Some(tensors),
        }
        self.missing = self.missing.saturating_sub(1);
        if let Some(tensors) = self.built.clone().filter(|_| self.missing == 0) {
            self.say(ToLeader::Built { tensors, device, parameters });
        }
    }

    fn put(&mut self, put: Put) {
        let Some(attempt) = self.ordered.as_ref().map(|ordered| ordered.attempt.clone()) else { return };
        let words = match put {
            Put::Progress(bytes) => ToLeader::Progress { attempt, bytes },
            Put::Ended(_, result) => {
                self.put = Some(result.is_ok());
                if let Ok(receipt) = &result {
                    self.holds(receipt);
                }
                let result = result.map(Box::new).map_err(|error| error.to_string());
                ToLeader::Put { attempt, result }
            }
        };
        self.say(words);
    }

    /// This node's part of a save is in the store: its slot holds these files for workers that crash. Whether the save
    /// becomes a checkpoint does not matter: nobody looks for the files of one that does not.
    fn holds(&mut self, receipt: &Receipt) {
        let checksums = receipt.files.iter().map(|file| (file.name.clone(), file.crc64)).collect();
        let (slot, step, generation) = (self.slot, receipt.step, receipt.generation);
        let _ = self.node.perform(Order::Hold { slot, step, generation, checksums });
    }

    /// Carries out an order of the leader.
    fn obey(&mut self, order: ToMember) -> Result<()> {
        let answer = match order {
            // Each node reads its own slot.
            ToMember::Tell(ToWorker::Restore { weights_only, .. }) => match &self.incoming {
                Incoming::Here(slot, files, _) | Incoming::UnderWay(slot, files) => {
                    let (slot, files) = (*slot, files.clone());
                    self.node.perform(Order::TellAll(ToWorker::Restore { slot, files, weights_only }))
                }
                Incoming::Nothing => None,
            },
            ToMember::Tell(message) => {
                if matches!(message, ToWorker::Go { .. }) {
                    // The leader has decided from its own memory; this is for the case that this node leads next.
                    let _ = self.pace.begins(self.world, pace::LEAST);
                }
                self.node.perform(Order::TellAll(message))
            }
            ToMember::LayOut => {
                let tensors = self.built.clone().unwrap_or_default();
                self.node.perform(Order::LayOut(tensors))
            }
            ToMember::Received => self.node.perform(Order::Received),
            ToMember::Kill => {
                self.kill();
                None
            }
            ToMember::Put { attempt, step, slot, priority, whole } => {
                self.ordered = Some(Ordered { attempt: attempt.clone(), step, whole: *whole });
                (self.slot, self.put) = (slot, None);
                let part = Part { attempt: attempt.clone(), step, slot, priority, small: Vec::new() };
                if let Err(error) = self.node.put(part, self.says.clone()) {
                    self.say(ToLeader::Put { attempt, result: Err(error.to_string()) });
                }
                None
            }
            ToMember::GiveUpSave => {
                self.ordered = None;
                self.node.gives_up_save();
                None
            }
            ToMember::Unfit { why } => {
                self.unfit = Some(why);
                None
            }
            ToMember::HandsOver { why } => {
                self.hands_over = Some(why);
                None
            }
            ToMember::Over { .. } | ToMember::Wrong { .. } => None,
        };
        match answer {
            Some(Event::LaidOut { bytes }) => self.say(ToLeader::LaidOut { bytes }),
            Some(Event::Lost(error)) => {
                self.say(ToLeader::Failed(error.to_string()));
                return Err(Error::context(error, "follow the leader"));
            }
            _ => {}
        }
        Ok(())
    }

    /// The workers compute nothing any more: their collectives are broken. Their slots stay.
    fn kill(&mut self) {
        let _ = self.node.perform(Order::Kill);
    }

    /// The generation is over. Others' words about a death may have come before it: one of the workers that this node
    /// has killed may have died of its own.
    async fn hear_the_dead(&mut self, answers: &mut Answers) {
        if self.leaving.is_some() {
            return;
        }
        self.node.killed().await;
        while let Some(event) = answers.ready() {
            if let Event::Worker(event) = &event
                && let Some(why) = self.watch.hears(event)
            {
                // The leader waits a moment for it: it would give up the run otherwise.
                self.say(ToLeader::Blamed { why: why.clone() });
                self.blamed = Some(why);
            }
        }
    }

    /// Finishes the save under way in the leader's place, if all of it is there; its step, if that was done.
    async fn finish(&mut self, start: &Plan, puts: &mut mpsc::UnboundedReceiver<Put>) -> Result<Option<Step>> {
        let Some(ordered) = self.ordered.take() else { return Ok(None) };
        let (mut put, mut receipt) = (self.put, None);
        let own = async {
            while put.is_none() {
                match puts.recv().await {
                    Some(Put::Progress(_)) => {}
                    Some(Put::Ended(_, result)) => (put, receipt) = (Some(result.is_ok()), result.ok()),
                    None => return false,
                }
            }
            put == Some(true)
        };
        let committed = finish::finish(&start.upload, ordered, own).await;
        if let Some(receipt) = receipt {
            self.holds(&receipt);
        }
        let committed = committed?;
        Ok(committed.map(|committed| committed.step))
    }

    /// Ends this node's part: its workers, its uploads, its fetch.
    async fn end(mut self, dismisses: bool) -> Result<()> {
        self.node.stops_fetching();
        self.node.gives_up_save();
        let gone = self.node.ends_workers(dismisses).await;
        self.node.leaves_slots(gone).await
    }
}
