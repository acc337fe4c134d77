//! Random lives of a run compared with a model of a few lines: agents that boot, save, are killed between any two steps
//! of a save, wake up after others have taken over, or turn back; objects that are damaged and repaired; checkpoints
//! that are condemned, cleared or pruned.
//!
//! Journal, saves, discovery and pruning are the real code on a real store; [`Model`] gives the expected result. A
//! failure prints the shortest sequence that shows it. `PROPTEST_RNG_SEED=<number>` repeats a run.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::{prelude::*, strategy::ValueTree};
use trainer::{
    checkpoint::{
        CheckpointError,
        catalog::{self, Damage},
        condemn::{self, Docket},
        manifest::{FileKind, TrainerState},
        prune::{Standing, apply_prune, doomed, plan_prune},
        restore,
        save::{Save, Upload, put_manifest, put_shards},
        verify::{Depth, Proof, verify},
    },
    config::Keep,
    format::header::{self, Dtype},
    ids::{AttemptId, Generation, NodeId, Step, WorldSize},
    journal::{
        self, Committed, Formed, FormedReason, Journal, JournalError, Metrics, Record, ResumePoint, RosterEntry,
        SaveCost, Succession, replay,
    },
    layout,
    storage::Store,
};

use crate::support::samples;

/// (step, generation).
type Point = (u64, u64);

const AGENTS: usize = 3;

/// Where a save is interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cut {
    AfterAShard,
    AfterShards,
    AfterManifest,
    Never,
}

#[derive(Clone, Copy, Debug)]
enum Harm {
    Flip,
    Short,
    Gone,
}

#[derive(Clone, Debug)]
enum Op {
    /// An agent starts, or restarts, and forms a generation on the newest checkpoint.
    Boot {
        who: usize,
    },
    /// The same with `--from`.
    TurnBack {
        who: usize,
        to: prop::sample::Index,
    },
    /// An agent's next save, until it is killed. An agent that does not know of others trains on and is not killed by
    /// them.
    Save {
        who: usize,
        cut: Cut,
    },
    /// Another save of the step before, by a new attempt.
    SaveAgain {
        who: usize,
    },
    /// A checkpoint is damaged.
    Damage {
        which: prop::sample::Index,
        file: prop::sample::Index,
        harm: Harm,
    },
    Prune {
        last: u32,
    },
    /// The damage of a checkpoint is undone, and a process reads all of it.
    Mend {
        which: prop::sample::Index,
    },
    /// A summary of the journal is damaged, which must not matter.
    Summary {
        which: prop::sample::Index,
        harm: Harm,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let cut =
        prop::sample::select(vec![Cut::AfterAShard, Cut::AfterShards, Cut::AfterManifest, Cut::Never, Cut::Never]);
    let harm = prop::sample::select(vec![Harm::Flip, Harm::Short, Harm::Gone]);
    let index = any::<prop::sample::Index>;
    prop_oneof![
        3 => (0..AGENTS).prop_map(|who| Op::Boot { who }),
        1 => (0..AGENTS, index()).prop_map(|(who, to)| Op::TurnBack { who, to }),
        6 => (0..AGENTS, cut).prop_map(|(who, cut)| Op::Save { who, cut }),
        1 => (0..AGENTS).prop_map(|who| Op::SaveAgain { who }),
        1 => (index(), index(), harm.clone()).prop_map(|(which, file, harm)| Op::Damage { which, file, harm }),
        1 => (1_u32..4).prop_map(|last| Op::Prune { last }),
        1 => index().prop_map(|which| Op::Mend { which }),
        1 => (index(), harm.clone()).prop_map(|(which, harm)| Op::Summary { which, harm }),
    ]
}

/// The expected result. A checkpoint grows from the one before it. The run is the newest good checkpoint and its
/// ancestors; only the last node that formed may add to it.
#[derive(Default)]
struct Model {
    grew_from: BTreeMap<Point, Option<Point>>,
    bad: BTreeSet<Point>,
    /// The contents of damaged objects before the damage.
    before: BTreeMap<Point, BTreeMap<String, Bytes>>,
    head: Option<Point>,
    generation: u64,
    holder: usize,
}

impl Model {
    fn newest_good(&self) -> Option<Point> {
        std::iter::successors(self.head, |point| self.grew_from[point]).find(|point| !self.bad.contains(point))
    }
    fn forms(&mut self, who: usize, from: Option<Point>) {
        (self.generation, self.holder, self.head) = (self.generation + 1, who, from);
    }
    fn commits(&mut self, who: usize, point: Point) -> bool {
        let may = self.holder == who && self.generation == point.1;
        if may {
            self.grew_from.insert(point, self.head);
            self.head = Some(point);
        }
        may
    }
}

struct Agent {
    journal: Journal,
    generation: u64,
    step: u64,
    /// The last save that it began.
    last: Option<Save>,
}

/// The state after a step: bytes that no other state has.
fn save_of(node: &NodeId, (step, generation): Point) -> Save {
    let file = |kind: u8| {
        let mut bytes = header::write([("weight", Dtype::I64, &[4_u64][..])]).expect("short");
        for value in [step, generation, u64::from(kind), step.wrapping_mul(0x9e37_79b9)] {
            bytes.extend(value.to_le_bytes());
        }
        Bytes::from(bytes)
    };
    let upload = |name: &str, kind, body| Upload { name: name.to_owned(), kind, body };
    let sequences = std::num::NonZeroU64::new(1000).expect("not zero");
    let state = TrainerState::at(Step(step), &samples::config().workload, sequences).expect("small");
    Save {
        attempt: AttemptId::random(),
        run_id: samples::run_id(),
        step: Step(step),
        generation: Generation(generation),
        node: node.clone(),
        world_size: WorldSize(1),
        uploads: vec![
            upload("model-00001-of-00001.safetensors", FileKind::Model, file(1)),
            upload("optimizer-00001-of-00001.safetensors", FileKind::Optimizer, file(2)),
        ],
        small: vec![(layout::TRAINER_STATE.to_owned(), state.to_bytes().expect("plain").into())],
    }
}

fn point_of(point: &ResumePoint) -> Point {
    (point.step.get(), point.generation.get())
}

/// Carries out a save up to `cut`; `Ok(true)`: it is committed.
async fn carry_out(store: &Store, journal: &mut Journal, save: &Save, cut: Cut) -> Result<bool, JournalError> {
    if cut == Cut::AfterAShard {
        let shard = &save.uploads[0];
        let key = format!("{}/{}", save.folder(), shard.name);
        store.upload(&key, shard.body.clone(), |_| {}).await?;
        return Ok(false);
    }
    let receipt = put_shards(store, save, |_| {}).await.expect("nobody else writes here");
    if cut == Cut::AfterShards {
        return Ok(false);
    }
    let shards = save.uploads.iter().map(|upload| upload.name.clone());
    let expected: Vec<String> = shards.chain(save.small.iter().map(|(name, _)| name.clone())).collect();
    let manifest = put_manifest(store, save, &[receipt], &expected).await.expect("nobody else writes here");
    if cut == Cut::AfterManifest {
        return Ok(false);
    }
    let committed = Committed {
        step: save.step,
        generation: save.generation,
        manifest: manifest.key,
        manifest_crc64: manifest.crc64,
        bytes: manifest.bytes,
        loss: Some(1.0),
        validation_loss: None,
        metrics: Metrics::new(),
        cost: SaveCost::default(),
    };
    journal.append(Record::Committed(committed)).await.map(|_| true)
}

/// Finds the newest checkpoint that is whole to the last byte, as an agent does: a checkpoint that turns out damaged
/// when loaded is skipped, and one of these is condemned once another one was loaded.
async fn discover(store: &Store, journal: &mut Journal) -> Option<Point> {
    let docket = Docket::default();
    loop {
        let candidates = journal.state().candidates().into_iter().filter(|c| !docket.passes_over(&c.point()));
        let candidates: Vec<Committed> = candidates.map(|c| c.committed.clone()).collect();
        let outcome = catalog::newest_usable(store, &candidates, None).await.expect("a store");
        for damage in &outcome.stepped_over {
            docket.suspect(damage);
        }
        let (committed, manifest) = outcome.found?;
        let files = restore::tensor_files(&manifest);
        let pieces = restore::plan_pieces(&files, 1 << 20).expect("small").pieces;
        let buffers = pieces.iter().map(|piece| (*piece, vec![0; piece.len as usize])).collect();
        let (step, generation) = (committed.step, committed.generation);
        match restore::fetch(store, &manifest.folder(), &files, buffers, |_| {}).await {
            Ok(()) => {
                docket.vouch(&ResumePoint { step, generation }, Proof::Bytes);
                let condemned = docket.condemn(journal).await.expect("not fenced, just read");
                assert!(condemned.is_none_or(|damage| !damage.is_of(&ResumePoint { step, generation })));
                assert_eq!(docket.condemn(journal).await.expect("not fenced"), None, "one for one");
                return Some((step.get(), generation.get()));
            }
            Err(CheckpointError::Damaged { object, reason }) => {
                docket.suspect(&Damage { step, generation, object, reason: reason.to_string() });
            }
            Err(error) => panic!("{error}"),
        }
    }
}

async fn boot(store: &Store, from: Option<Point>) -> Result<(Agent, Option<Point>), String> {
    let node = NodeId::random();
    let mut journal = Journal::open(store.clone(), node.clone(), samples::run_id()).await.expect("a journal");
    let found = match from {
        Some(from) => Some(from),
        None => discover(store, &mut journal).await,
    };
    let resume = found.map(|(step, generation)| ResumePoint { step: Step(step), generation: Generation(generation) });
    let roster = vec![RosterEntry::new(node, 1)];
    let (world_size, overrides, reason) = (WorldSize(1), Vec::new(), FormedReason::Started);
    let formed =
        Formed { roster, world_size, resume, overrides, reason, data: None, succession: Succession::default() };
    let generation = journal.form(formed).await.map_err(|error| error.to_string())?.get();
    Ok((Agent { journal, generation, step: found.map_or(0, |point| point.0), last: None }, found))
}

async fn live(store: &Store, script: &[Op]) {
    Journal::create(store.clone(), NodeId::random(), samples::run_id(), samples::config()).await.expect("a new run");
    let mut model = Model::default();
    let mut agents: [Option<Agent>; AGENTS] = [const { None }; AGENTS];
    for (number, op) in script.iter().enumerate() {
        match op {
            Op::Boot { who } => {
                let expected = model.newest_good();
                match boot(store, None).await {
                    Ok((agent, found)) => {
                        assert_eq!(found, expected, "op {number}: {op:?}");
                        agents[*who] = Some(agent);
                        model.forms(*who, expected);
                    }
                    // No run starts over because none of its checkpoints is good any more.
                    Err(error) => {
                        assert!(expected.is_none() && !model.grew_from.is_empty(), "op {number}: {op:?}: {error}");
                    }
                }
            }
            Op::TurnBack { who, to } => {
                let good: Vec<Point> =
                    model.grew_from.keys().filter(|point| !model.bad.contains(point)).copied().collect();
                if good.is_empty() {
                    continue;
                }
                let to = *to.get(&good);
                let (agent, _) =
                    boot(store, Some(to)).await.unwrap_or_else(|error| panic!("op {number}: {op:?}: {error}"));
                agents[*who] = Some(agent);
                model.forms(*who, Some(to));
            }
            Op::Save { who, .. } | Op::SaveAgain { who } => {
                let Some(agent) = &mut agents[*who] else { continue };
                // A checkpoint that was damaged or pruned since is not saved again: its record exists.
                let last =
                    agent.last.take().filter(|last| !model.bad.contains(&(last.step.get(), last.generation.get())));
                let (save, cut) = match (op, last) {
                    (Op::SaveAgain { .. }, Some(last)) => (Save { attempt: AttemptId::random(), ..last }, Cut::Never),
                    (Op::SaveAgain { .. }, None) => continue,
                    (Op::Save { cut, .. }, _) => {
                        agent.step += 1;
                        (save_of(agent.journal.node(), (agent.step, agent.generation)), *cut)
                    }
                    _ => continue,
                };
                let point = (save.step.get(), save.generation.get());
                let stands = model.grew_from.contains_key(&point);
                let saved = carry_out(store, &mut agent.journal, &save, cut).await;
                agent.last = Some(save);
                match saved {
                    Ok(false) => {}
                    Ok(true) => {
                        assert!(stands || model.commits(*who, point), "op {number}: {op:?}: {point:?} was committed")
                    }
                    Err(JournalError::Fenced { .. }) => {
                        assert!(!stands && !model.commits(*who, point), "op {number}: {op:?}: {point:?} was fenced");
                        agents[*who] = None;
                    }
                    Err(error) => panic!("op {number}: {op:?}: {error}"),
                }
            }
            Op::Damage { which, file, harm } => {
                let hurt: Vec<Point> = model.grew_from.keys().copied().collect();
                if hurt.is_empty() {
                    continue;
                }
                let point = *which.get(&hurt);
                let folder = layout::checkpoint(Step(point.0), Generation(point.1));
                let mut keys: Vec<String> =
                    store.list(&folder).await.expect("a store").into_iter().map(|i| i.key).collect();
                keys.retain(|key| key.ends_with(".safetensors") || key.ends_with(layout::MANIFEST));
                keys.sort_unstable();
                if keys.is_empty() {
                    continue;
                }
                let key = file.get(&keys);
                let mut bytes = store.get(key, 1 << 20).await.expect("listed").to_vec();
                model.before.entry(point).or_default().entry(key.clone()).or_insert_with(|| bytes.clone().into());
                match harm {
                    Harm::Gone => store.delete(key).await.expect("deleted"),
                    Harm::Short => {
                        bytes.pop();
                        store.put(key, bytes.into()).await.expect("put");
                    }
                    Harm::Flip => {
                        // Another byte each time: flipping the same one twice would repair it.
                        let at = number % bytes.len();
                        bytes[at] ^= 0x10;
                        store.put(key, bytes.into()).await.expect("put");
                    }
                }
                model.bad.insert(point);
            }
            Op::Prune { last } => {
                let mut journal =
                    Journal::open(store.clone(), NodeId::random(), samples::run_id()).await.expect("a journal");
                // Verified to the last byte: by sizes alone, one with bit rot could push out the good ones.
                let verified = discover(store, &mut journal).await;
                assert_eq!(verified, model.newest_good(), "op {number}: {op:?}");
                let Some((step, generation)) = verified else { continue };
                let verified = ResumePoint { step: Step(step), generation: Generation(generation) };
                let own = |list: Vec<&trainer::journal::Checkpoint>| -> Vec<trainer::journal::Checkpoint> {
                    list.into_iter().cloned().collect()
                };
                let (line, good) = (own(journal.state().candidates()), own(journal.state().good()));
                let live: Vec<_> =
                    journal.state().formed().and_then(|formed| formed.resume.clone()).into_iter().collect();
                let standing = Standing { usable: verified.clone(), verified: Some(verified) };
                let keep = Keep { last: *last, every: None, best: 0 };
                let plan = doomed(&plan_prune(&line, &good, keep, &standing, &live));
                let kept = line.iter().filter(|checkpoint| !plan.contains(&checkpoint.point())).count();
                assert!(kept >= line.len().min(*last as usize), "op {number}: {op:?} keeps {kept} of {}", line.len());
                let records = journal.state().next() + u64::from(!plan.is_empty());
                let journal = tokio::sync::Mutex::new(journal);
                let journal = &journal;
                let append = |points| async move {
                    journal
                        .lock()
                        .await
                        .append(Record::pruned(points))
                        .await
                        .map(drop)
                        .map_err(|e| CheckpointError::Internal(e.to_string()))
                };
                apply_prune(store, &plan, append).await.unwrap_or_else(|error| panic!("op {number}: {op:?}: {error}"));
                assert_eq!(journal.lock().await.state().next(), records, "op {number}: {op:?} is one record");
                model.bad.extend(plan.iter().map(point_of));
                model.before.retain(|point, _| !plan.iter().any(|gone| point_of(gone) == *point));
            }
            Op::Mend { which } => {
                let hurt: Vec<Point> = model.before.keys().copied().collect();
                if hurt.is_empty() {
                    continue;
                }
                let (step, generation) = *which.get(&hurt);
                for (key, bytes) in model.before.remove(&(step, generation)).unwrap_or_default() {
                    store.put(&key, bytes).await.expect("put");
                }
                let mut journal =
                    Journal::open(store.clone(), NodeId::random(), samples::run_id()).await.expect("a journal");
                let checkpoint = journal.state().checkpoint(Step(step), Generation(generation)).expect("committed");
                let committed = checkpoint.committed.clone();
                let report = verify(store, &committed, Depth::Bytes { part: 64 }, &|_| {}).await.expect("a store");
                assert!(report.is_sound(), "op {number}: {op:?}: {report:?}");
                condemn::clear(&mut journal, &report).await.expect("not fenced, just read");
                model.bad.remove(&(step, generation));
            }
            Op::Summary { which, harm } => {
                let summaries = store.list(layout::SUMMARIES).await.expect("a store");
                if summaries.is_empty() {
                    continue;
                }
                let key = &which.get(&summaries).key;
                let mut bytes = store.get(key, 1 << 20).await.expect("listed").to_vec();
                match harm {
                    Harm::Gone => store.delete(key).await.expect("deleted"),
                    Harm::Short => {
                        bytes.pop();
                        store.put(key, bytes.into()).await.expect("put");
                    }
                    Harm::Flip => {
                        let at = number.wrapping_mul(37) % bytes.len();
                        bytes[at] ^= 0x10;
                        store.put(key, bytes.into()).await.expect("put");
                    }
                }
            }
        }
        let state = replay(store, &samples::run_id()).await.expect("the journal reads");
        let committed: BTreeSet<Point> = state.checkpoints().iter().map(|c| point_of(&c.point())).collect();
        assert_eq!(committed.len(), state.checkpoints().len(), "op {number}: {op:?}: something is committed twice");
        assert_eq!(committed, model.grew_from.keys().copied().collect(), "op {number}: {op:?}");
        assert_eq!(state.generation().get(), model.generation, "op {number}: {op:?}");
        assert!(committed.is_empty() || state.newest().is_some(), "op {number}: {op:?}: all are condemned");
    }
    // Whatever was killed, lost or garbled: a summary says what the records say, or is found not to.
    journal::audit(store, &samples::run_id()).await.expect("no summary disagrees");
    assert_wrong_summaries_are_named(store).await;
}

/// The same run in another life: its summaries are sound, but differ from the records.
async fn assert_wrong_summaries_are_named(store: &Store) {
    let elsewhere = Store::open("memory://", &samples::storage()).expect("a store").folder("run");
    let node = NodeId::random();
    let mut journal = Journal::create(elsewhere.clone(), node.clone(), samples::run_id(), samples::config())
        .await
        .expect("a new run");
    let roster = vec![RosterEntry::new(node, 1)];
    let (world_size, overrides, reason) = (WorldSize(1), Vec::new(), FormedReason::Started);
    let formed =
        Formed { roster, world_size, resume: None, overrides, reason, data: None, succession: Succession::default() };
    let generation = journal.form(formed).await.expect("nobody else");
    while journal.state().next() < 16 {
        let notice =
            Record::Notice { generation, source: "x".into(), deadline_s: None, means: trainer::journal::Means::Stop };
        journal.append(notice).await.expect("nobody else");
    }
    journal.summed_up(std::time::Duration::from_secs(60)).await;
    let key = layout::summaries(16, Some(0)) + "/00000000000000000016";
    let wrong = elsewhere.get(&key, 1 << 20).await.expect("a summary");
    // The records of this life with that summary.
    let apart = Store::open("memory://", &samples::storage()).expect("a store").folder("run");
    let records = replay(store, &samples::run_id()).await.expect("the journal reads").next();
    if records < 16 {
        return;
    }
    for key in (0..records).map(layout::journal_entry) {
        apart.put(&key, store.get(&key, 1 << 22).await.expect("a record")).await.expect("put");
    }
    apart.put(&key, wrong).await.expect("put");
    let error = replay(&apart, &samples::run_id()).await.expect_err("it disagrees").to_string();
    assert!(error.contains(&key) && error.contains("disagrees"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) })]

    #[test]
    fn any_life_of_a_run_matches_the_model(script in prop::collection::vec(op(), 1..50)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let store = Store::open("memory://", &samples::storage()).expect("a store").folder("run");
        runtime.block_on(live(&store, &script));
    }
}

#[test]
fn a_life_on_a_file_system_matches_the_model() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..4 {
        let script = prop::collection::vec(op(), 20..30).new_tree(&mut runner).expect("a script").current();
        let folder = tempfile::tempdir().expect("a folder");
        let uri = format!("file://{}", folder.path().display());
        let store = Store::open(&uri, &samples::storage()).expect("a store").folder("run");
        println!("{script:?}");
        runtime.block_on(live(&store, &script));
    }
}
