//! The order of effects, those after one that fails, and what an end means for the work under way; without processes.

use std::sync::{Arc, Mutex};

use super::*;
use crate::{
    agent::{
        effects::{Answers, Order, channels},
        generation::{Load, Source, Stopped},
        group::ToMember,
        node::Crew,
        phase::Incoming,
        save::{gather::Fetched, slots::Slots, upload::SaveEvent},
        stopping::Stopping,
        workers::{WorkerEvent, Workers},
    },
    checkpoint::{
        condemn::Docket,
        testing::{config, memory_store},
    },
    error::{Error, Kind},
    format::header::Dtype,
    history::spent::Spent,
    ids::{Generation, NodeId, NodeRanks, Rank, RunId, SlotCount, Step, WorldSize},
    journal::{Formed, FormedReason, Journal, JournalWriter, Means, RosterEntry, Succession},
    layout,
    rendezvous::channel::bulk::{Lends, Refusal, Wanted},
    report::{Event as Told, Screen},
    snapshot::{
        cadence::Measured,
        plan::{ShardKind, TensorSpec},
    },
    storage::{Priority, Store},
    workload::{Figures, Workload},
};

/// A test that hangs fails.
const LIMIT: Duration = Duration::from_secs(60);

/// The warnings reported so far.
type Heard = Arc<Mutex<Vec<String>>>;

/// Everything that outlives a lead.
struct Stage {
    plan: Plan,
    slots: Slots,
    reporter: Reporter,
    heard: Heard,
    store: Store,
}

impl Stage {
    /// Generation 1 of a run in a new store, of no workers.
    async fn new() -> Self {
        let store = memory_store();
        let (node, run_id) = (NodeId::random(), RunId::new("run").unwrap());
        let mut journal = Journal::create(store.clone(), node.clone(), run_id.clone(), config()).await.unwrap();
        let workload = Arc::new(Workload::of_no_workers());
        let formed = Formed {
            roster: vec![RosterEntry::new(node.clone(), 1)],
            world_size: WorldSize(1),
            resume: None,
            overrides: Vec::new(),
            reason: FormedReason::Started,
            data: Some(workload.data().clone()),
            succession: Succession::default(),
        };
        let generation = journal.form(formed).await.unwrap();
        let heard = Heard::default();
        let reporter = Reporter::with_listener(Screen::plain(), false, {
            let heard = Arc::clone(&heard);
            Box::new(move |event| {
                if let Told::Warning { message } = event {
                    heard.lock().unwrap().push(message.clone());
                }
            })
        });
        let plan = Plan {
            config: config(),
            workload: Arc::clone(&workload),
            load: Load::Nothing,
            upload: upload::Context {
                run: store.clone(),
                run_id,
                members: vec![node.clone()],
                node,
                generation,
                formed: Instant::now(),
                ranks: NodeRanks::alone(1),
                journal: JournalWriter::start(journal),
            },
            stopping: Stopping::of(&config(), None),
            measured: Measured::NOTHING,
            docket: Docket::default(),
            nearest: false,
            neighbours: None,
            store: "127.0.0.1:0".parse().unwrap(),
            doubted: false,
            spent: Spent::default(),
            kept: None,
            collectives: Arc::default(),
        };
        Self { plan, slots: Slots::create(SlotCount::TWO).unwrap(), reporter, heard, store }
    }

    fn begin(&mut self) -> (Lead<'_>, Answers) {
        let (senders, answers) = channels();
        let (none, events) = (NodeRanks::alone(0), &senders.workers);
        let workers =
            Workers::start(&self.plan.workload, &self.plan.collectives, none, &self.slots.shared(), events).unwrap();
        let crew = Crew { workers, regroups: false, keeps_state: false };
        let node = Node::begin(&self.plan, &mut self.slots, crew).unwrap();
        (Lead::begin(&self.plan, Instant::now(), node, (Others::none(), None), &self.reporter, senders), answers)
    }
}

fn all(list: impl IntoIterator<Item = Effect>) -> Effects {
    let mut effects = Effects::default();
    list.into_iter().for_each(|effect| effects.push(effect));
    effects
}

fn warning(message: &str) -> Effect {
    Effect::Report(Told::Warning { message: message.into() })
}

fn lay_out() -> Effect {
    let spec = |name: &str, kind| TensorSpec { name: name.into(), dtype: Dtype::F32, shape: vec![3], kind, part: None };
    Effect::Nodes(Order::LayOut(vec![spec("a", ShardKind::Model), spec("exp_avg.a", ShardKind::Optimizer)]))
}

fn save(step: u64) -> Effect {
    let (cost, taken) = (SaveCost::default(), Duration::ZERO);
    let figures = Figures { loss: Some(1.5), ..Figures::default() };
    let priority = Priority::Normal;
    Effect::Upload(Transfer { step: Step(step), slot: 0, figures, validation_loss: None, cost, taken, priority })
}

fn stopped(step: u64, committed: u64) -> Result<End> {
    let (step, committed) = (Step(step), Step(committed));
    Ok(End::Stopped(Stopped { step, committed, verdict: "the time was up".into(), drain: None, cap: None }))
}

fn failure() -> Error {
    Error::new(Kind::Data, "x")
}

async fn next(answers: &mut Answers) -> Event {
    tokio::time::timeout(LIMIT, answers.next()).await.expect("nothing is answered")
}

/// How the save of `step` ended.
async fn saved(answers: &mut Answers) -> Result<upload::Saved> {
    loop {
        if let Event::Save(SaveEvent::Ended { result, .. }) = next(answers).await {
            return result;
        }
    }
}

#[tokio::test]
async fn effects_are_performed_in_their_order() {
    let mut stage = Stage::new().await;
    let heard = Arc::clone(&stage.heard);
    let (mut lead, _answers) = stage.begin();
    let done = lead.perform(all([warning("a"), warning("b"), warning("c")]));
    assert!(matches!(done, ControlFlow::Continue(answers) if answers.is_empty()));
    assert_eq!(*heard.lock().unwrap(), ["a", "b", "c"]);
}

#[tokio::test]
async fn after_an_effect_that_fails_the_others_are_performed_and_answers_keep_the_order() {
    let mut stage = Stage::new().await;
    let heard = Arc::clone(&stage.heard);
    let (mut lead, _answers) = stage.begin();
    // There is no layout yet, so there is nothing to upload.
    let done = lead.perform(all([warning("a"), save(1), lay_out(), warning("b")]));
    let ControlFlow::Continue(answers) = done else { panic!("it has ended") };
    assert!(matches!(&answers[..], [Event::Lost(_), Event::LaidOut { bytes: 1.. }]), "{answers:?}");
    assert_eq!(*heard.lock().unwrap(), ["a", "b"]);
}

#[tokio::test]
async fn an_end_comes_after_all_effects_and_outranks_their_answers() {
    let mut stage = Stage::new().await;
    let heard = Arc::clone(&stage.heard);
    let (mut lead, _answers) = stage.begin();
    let done = lead.perform(all([save(1), warning("a")]).ending(Err(failure())));
    let ControlFlow::Break(Err(error)) = done else { panic!("{done:?}") };
    assert_eq!((error.to_string(), &*heard.lock().unwrap()), ("x".into(), &vec!["a".to_owned()]));
}

#[tokio::test]
async fn a_save_is_recorded_with_the_cost_that_was_told_last() {
    let mut stage = Stage::new().await;
    let journal = stage.plan.upload.journal.clone();
    let (mut lead, mut answers) = stage.begin();
    let cost = |stall_s| Effect::Cost(SaveCost { stall_s, ..SaveCost::default() });
    // A cost without a save says nothing.
    let done = lead.perform(all([cost(9.0), lay_out(), save(1), cost(2.0), cost(3.0)]));
    assert!(matches!(done, ControlFlow::Continue(answers) if answers.len() == 1));
    let committed = saved(&mut answers).await.unwrap().committed;
    assert_eq!((committed.step, committed.loss, committed.cost.stall_s), (Step(1), Some(1.5), 3.0));
    assert_eq!(journal.state().newest().map(|newest| newest.committed.clone()), Some(committed));
}

#[tokio::test]
async fn only_a_run_that_was_stopped_gives_up_its_save() {
    for (end, given_up) in [
        (stopped(1, 0), true),
        (Err(failure()), false),
        (Ok(End::Completed { step: Step(1), loss: Some(1.0), early: None }), false),
    ] {
        let mut stage = Stage::new().await;
        let journal = stage.plan.upload.journal.clone();
        let (mut lead, mut answers) = stage.begin();
        let done = lead.perform(all([lay_out(), save(1)]));
        assert!(done.is_continue());
        let _left = tokio::time::timeout(LIMIT, lead.end(&end, &Members::default())).await.expect("it hangs");
        let saved = saved(&mut answers).await;
        assert_eq!(saved.is_err(), given_up, "{end:?}: {saved:?}");
        assert_eq!(journal.state().newest().is_none(), given_up, "{end:?}");
    }
}

#[tokio::test]
async fn only_an_end_with_a_last_record_leaves_the_workers_to_it() {
    for (end, leaves) in [
        (stopped(1, 0), true),
        (stopped(1, 1), true),
        (Ok(End::Completed { step: Step(1), loss: Some(1.0), early: None }), true),
        (Err(failure()), false),
    ] {
        let mut stage = Stage::new().await;
        let (lead, _answers) = stage.begin();
        let left = tokio::time::timeout(LIMIT, lead.end(&end, &Members::default())).await.expect("it hangs").unwrap();
        assert_eq!(left.is_some(), leaves, "{end:?}");
        if let Some(Left { leaving, retention, members: _, kept: _, stepped: _ }) = left {
            assert!(retention.is_some());
            tokio::time::timeout(LIMIT, leaving.expect("workers")).await.expect("they never go").unwrap();
        }
    }
}

/// The words by which the others hear that it is over: who stays.
fn stay(sent: &mut mpsc::UnboundedReceiver<(NodeId, ToMember)>) -> Vec<String> {
    let over = |(_, words)| match words {
        ToMember::Over { stay, .. } => Some(stay.iter().map(ToString::to_string).collect()),
        _ => None,
    };
    std::iter::from_fn(|| sent.try_recv().ok()).find_map(over).expect("its end")
}

#[tokio::test]
async fn workers_are_kept_if_their_step_is_committed_and_their_node_stays() {
    let id = |name: &str| NodeId::new(name).unwrap();
    let leaving =
        |names: &[&str]| Members { leaving: names.iter().map(|name| id(name)).collect(), ..Members::default() };
    let lost = Members { parted: vec![(id("b"), "silent".into())], ..Members::default() };
    let asked = Members { asked_here: true, ..Members::default() };
    let person = Members { ends_the_run: true, ..leaving(&["b"]) };
    let died = Ok(End::Died { step: Step(3), reason: String::new() });
    for (end, members, kept, who) in [
        (stopped(3, 3), leaving(&["b"]), true, &["me", "c"][..]),
        (stopped(3, 3), lost, true, &["me", "c"]),
        (stopped(3, 3), leaving(&[]), true, &["me", "b", "c"]),
        (stopped(3, 3), asked, false, &["b", "c"]),
        (stopped(3, 3), person, false, &[]),
        // Not that very step, or not committed.
        (stopped(3, 2), leaving(&["b"]), false, &[]),
        (stopped(4, 4), leaving(&["b"]), false, &[]),
        (died, leaving(&["b"]), false, &[]),
    ] {
        let case = format!("{end:?} {members:?}");
        let Stage { mut plan, mut slots, reporter, .. } = Stage::new().await;
        plan.upload.node = id("me");
        plan.upload.members = ["me", "b", "c"].map(id).to_vec();
        let (senders, _answers) = channels();
        let workers = Workers::stopped(Step(3), &senders.workers);
        let node = Node::begin(&plan, &mut slots, Crew { workers, regroups: false, keeps_state: false }).unwrap();
        let ranks = |first| NodeRanks { first: Rank(first), workers: 1, world: WorldSize(3) };
        let (to, mut sent) = mpsc::unbounded_channel();
        let others = Others::of(vec![(id("b"), ranks(1)), (id("c"), ranks(2))], to);
        let group = Group { leader: id("me"), members: plan.upload.members.iter().cloned().collect(), min: 1 };
        let lead = Lead::begin(&plan, Instant::now(), node, (others, Some(group)), &reporter, senders);
        let left = tokio::time::timeout(LIMIT, lead.end(&end, &members)).await.expect("it hangs").unwrap();
        assert_eq!(stay(&mut sent), who, "{case}");
        let left = left.and_then(|left| left.kept);
        assert_eq!(left.is_some(), kept, "{case}");
        // It began with nothing, so this generation has saved that step.
        assert!(left.is_none_or(|kept| kept.at() == (Step(3), Generation(1))), "{case}");
    }
}

#[test]
fn every_end_has_its_parting() {
    let (step, reason) = (Step(3), String::new());
    let parting = |gives_up_save, dismisses, leaves_rest| Parting { gives_up_save, dismisses, leaves_rest };
    for (end, expected) in [
        (Ok(End::Completed { step: Step(1), loss: Some(1.0), early: None }), parting(false, true, true)),
        (stopped(3, 3), parting(true, true, true)),
        (stopped(3, 4), parting(true, true, true)),
        (stopped(3, 2), parting(true, false, true)),
        (Ok(End::Died { step, reason: reason.clone() }), parting(false, false, false)),
        (Ok(End::Damaged { object: String::new(), reason: reason.clone().into() }), parting(false, false, false)),
        (Ok(End::Diverged { step, reason }), parting(false, false, false)),
        (Err(failure()), parting(false, false, false)),
    ] {
        assert_eq!(Parting::of(&end), expected, "{end:?}");
    }
}

#[tokio::test]
async fn the_record_of_a_notice_is_waited_for_when_a_run_stops() {
    let mut stage = Stage::new().await;
    let journal = stage.plan.upload.journal.clone();
    let (mut lead, _answers) = stage.begin();
    let generation = Generation(1);
    let note = Record::Notice { generation, source: "sigterm".into(), deadline_s: None, means: Means::Stop };
    assert!(lead.perform(all([Effect::Note(note)])).is_continue());
    let before = journal.state().next();
    let _left = tokio::time::timeout(LIMIT, lead.end(&stopped(1, 1), &Members::default())).await.expect("it hangs");
    assert_eq!(journal.state().next(), before + 1);
}

#[tokio::test]
async fn a_look_at_a_journal_that_is_gone_ends_the_run_unless_it_is_hushed() {
    for hushed in [false, true] {
        let mut stage = Stage::new().await;
        let state = stage.plan.upload.journal.state();
        stage.store.delete(&layout::journal_entry(state.next() - 1)).await.unwrap();
        let (mut lead, mut answers) = stage.begin();
        let hush = hushed.then_some(Effect::Hush);
        assert!(lead.perform(all([Effect::Look].into_iter().chain(hush))).is_continue());
        // It comes after all that the look does.
        let after = Duration::from_millis(500);
        assert!(lead.perform(all([Effect::Retry { slot: 1, after }])).is_continue());
        let first = next(&mut answers).await;
        assert_eq!(matches!(first, Event::Lost(_)), !hushed, "{first:?}");
        assert_eq!(matches!(first, Event::Retry { slot: 1 }), hushed, "{first:?}");
    }
}

#[tokio::test]
async fn workers_are_heard_before_saves_and_saves_before_the_rest() {
    let (senders, mut answers) = channels();
    senders.later.send(Event::Retry { slot: 1 }).unwrap();
    senders.fetched.send(Ok(Fetched { bytes: 1, stored: 1, lent: 0, seconds: 1.0 })).unwrap();
    senders.saves.send(SaveEvent::Progress { step: Step(1), bytes: 1 }).unwrap();
    senders.workers.send(WorkerEvent::Exited(Rank(0), "killed".into())).unwrap();
    assert!(matches!(next(&mut answers).await, Event::Worker(_)));
    assert!(matches!(next(&mut answers).await, Event::Save(_)));
    assert!(matches!(next(&mut answers).await, Event::Fetched(_)));
    assert!(matches!(next(&mut answers).await, Event::Retry { .. }));
}

/// The state that a node of a group has in a slot is its own answer, and others may read it until all have theirs.
#[tokio::test]
async fn a_node_that_holds_the_checkpoint_says_so_and_lends_it_until_all_have_it() {
    for alone in [true, false] {
        let Stage { mut plan, mut slots, .. } = Stage::new().await;
        let other = NodeId::random();
        if !alone {
            plan.upload.members.push(other.clone());
        }
        let from = Source::Slot { slot: 1, files: vec![(0, 10)] };
        plan.load = Load::Checkpoint { step: Step(4), generation: Generation(1), from };
        let wanted = Wanted { generation: plan.upload.generation, step: Step(4), of: Generation(1) };
        let shelf = Arc::clone(slots.shelf());
        let (senders, _answers) = channels();
        let (none, events) = (NodeRanks::alone(0), &senders.workers);
        let workers = Workers::start(&plan.workload, &plan.collectives, none, &slots.shared(), events).unwrap();
        let crew = Crew { workers, regroups: false, keeps_state: false };
        let mut node = Node::begin(&plan, &mut slots, crew).unwrap();
        let (done, mut heard) = mpsc::unbounded_channel();
        let incoming = node.load(done).unwrap();
        if alone {
            assert!(matches!(incoming, Incoming::Here(1, ..)) && heard.try_recv().is_err());
            continue;
        }
        assert!(matches!(incoming, Incoming::UnderWay(1, _)), "others may still fetch");
        assert!(matches!(heard.try_recv(), Ok(Ok(Fetched { bytes: 10, stored: 0, lent: 0, .. }))));
        assert_eq!(shelf.names(&other, &wanted).await, Ok(Vec::new()));
        assert!(node.perform(Order::Received).is_none());
        assert_eq!(shelf.names(&other, &wanted).await, Err(Refusal::Over), "captures are next");
    }
}
