//! Everything up to the first step, in the order of the protocol (`►` from the agent, `◄` to it):
//!
//! ```text
//! ► Start      ◄ Listening (rank 0 of several)    ◄ Built      the model and the list of its state
//! ► Peers (of several ranks)                                   the process group, and a first barrier
//! ► Layout     ► Restore (unless weights are drawn)    ◄ Ready     slots, a base, and the state in its tensors
//! ► Go                                                         the strategy meets its peers; the loop begins
//! ```
//!
//! A worker that lives on in another generation ([`again`]) hears `Regroup` in place of `Start`. If its state is the
//! one to go on from, it is told no `Restore`, and the tensors stay where they are; otherwise it drops everything and
//! loads, as a new one does. Only what is set once for a process is not set again.
//!
//! *Crash, error:* nothing has been changed that lasts. The agent starts the whole group again.

use std::{
    fs::File,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    Worker, device,
    fitting::Fitting,
    link::{Link, Orders},
    patience::{self, Patience},
    reports::{Reports, usage::Gauge},
    task::Task,
};
use crate::{
    config::OwnTask,
    data::{Dataset, identity},
    error::{Context, Error, Kind, Result},
    faults::{self, At},
    ids::{DatasetId, Fingerprint, Generation, Rank, SlotCount, Step},
    protocol::{Assignment, BASE_FD, FromWorker, SLOT_FDS, SaveOrder, StartSplit, ToWorker},
    random::mix,
    snapshot::{capture::Capture, image::SharedImage, plan::SlotCopy},
    task,
    torch::{self, Backend, HostCopier, ProcessGroup},
    train::{Batches, Built, Language, Lesson, Own, Place, Training, state::State, strategy::Peers},
};

const COPY_THREADS: usize = 2;

/// A worker that is ready for its first step.
pub(super) struct Started {
    pub worker: Worker,
    /// The saves already decided.
    pub saves: Vec<SaveOrder>,
    /// The loaded state is measured first.
    pub measure: bool,
}

/// In the worker's first generation.
pub(super) fn first(link: &Link, orders: &mut Orders) -> Result<Started> {
    let mut assignment = match orders.next() {
        ToWorker::Start(assignment) => *assignment,
        other => return Err(out_of_turn(&other)),
    };
    let task = Task::read(std::mem::take(&mut assignment.task))?;
    let train = &task.config.train;
    torch::set_num_threads(train.threads)?;
    torch::set_interop_threads(1)?;
    torch::set_deterministic(train.deterministic)?;
    start(link, orders, assignment, task, None)
}

/// In a later one, after `before`. `keeps`: its state is the one to go on from. The task is the same.
pub(super) fn again(
    link: &Link,
    orders: &mut Orders,
    mut assignment: Assignment,
    mut before: Training,
    keeps: bool,
) -> Result<Started> {
    let at = At { rank: Some(assignment.rank.get()), step: Some(assignment.resume_step.get()) };
    faults::check("worker.regroup", at).map_err(super::injected)?;
    let task = Task::read(std::mem::take(&mut assignment.task))?;
    before.rest()?;
    // Otherwise its memory is free before the next state is made.
    let before = keeps.then_some(before);
    start(link, orders, assignment, task, before)
}

/// Up to the first step. `before`: what this worker had, whose state it keeps.
fn start(
    link: &Link,
    orders: &mut Orders,
    assignment: Assignment,
    task: Task,
    before: Option<Training>,
) -> Result<Started> {
    let Assignment { rank, local_rank, world_size: world, generation, resume_step, store, several_nodes, .. } =
        assignment;
    let limit = patience::forming(several_nodes);
    let Task { config: task, data_dir, data, base } = task;
    let serves = world.get() > 1 && rank == Rank(0);
    let serve = || listen(link, store, limit);
    // Rank 0 listens before it does anything slow, so that its peers need not try again; but one that has served
    // before, not while that store may still have the port.
    let served = if serves && before.is_none() { Some(serve()?) } else { None };
    let place = Place { rank, world, device: device::pick(&task.parallel, task.train.precision, local_rank)? };
    let kept = before.map(|before| Built::again(before, &task.parallel, place)).transpose()?;
    let keeps = kept.is_some();
    let served = if serves && served.is_none() { Some(serve()?) } else { served };
    // Weights that are to be loaded need not be drawn first. Adapters begin fresh, whatever they are added to.
    let draw = resume_step == Step(0) && (task.model.init_from.is_none() || task.model.lora.is_some());
    let (mut split, begin) = (StartSplit::default(), Instant::now());
    let build = || -> Result<Built> {
        let lesson: Box<dyn Lesson> = match task.model.task() {
            None => {
                let batches = Batches::new(dataset(&data_dir, &data)?, task.data.sequence_length, &task.train, place)?;
                Box::new(Language::new(&task.model, &task.train, &task.parallel, place, draw, batches)?)
            }
            Some(own) => Box::new(Own::new(opened(&own, &data)?, &task.train, place, draw)?),
        };
        Built::new(lesson, task.train.clone(), &task.parallel, place)
    };
    let mut built = kept.map_or_else(build, Ok)?;
    split.model_s = begin.elapsed().as_secs_f64();
    let (tensors, parameters) = (built.state.specs().to_vec(), built.state.trained());
    link.tell(&FromWorker::Built { tensors, device: device_name(place.device), parameters });

    let group = if world.get() > 1 {
        let (group, took) = meet(orders, served, generation, (place, task.parallel.share_device), limit)?;
        split.group_s = took.as_secs_f64();
        Some(group)
    } else {
        None
    };
    let capture = match orders.next() {
        ToWorker::Layout { slots, copies } => {
            timed(&mut split.slots_s, || capture(slots, &copies, &built.state, place))?
        }
        other => return Err(out_of_turn(&other)),
    };
    if task.model.lora.is_some() && !keeps {
        built.base.load(&mapped(BASE_FD, &base).context("map the base")?, true).context("load the base")?;
    }
    if !draw && !keeps {
        match orders.next() {
            ToWorker::Restore { slot, files, weights_only } => {
                timed(&mut split.load_s, || restore(&mut built.state, slot, &files, weights_only))
                    .context("restore")?;
            }
            other => return Err(out_of_turn(&other)),
        }
    }
    let replicated = if world.get() > 1 { Some(built.state.replicated()?) } else { None };
    if let Some(replicated) = &replicated
        && faults::check("worker.loaded", At { rank: Some(rank.get()), step: Some(resume_step.get()) }).is_err()
    {
        replicated.flip_a_bit()?;
    }
    let fingerprint = match &replicated {
        Some(replicated) => Some(timed(&mut split.compare_s, || {
            whole(replicated.fingerprint()?, &built.base).context("compare states")
        })?),
        None => None,
    };
    link.tell(&FromWorker::Ready { fingerprint, split });
    let (saves, first_s, measure) = match orders.next() {
        ToWorker::Go { saves, first_s, measure } => (saves, first_s, measure),
        other => return Err(out_of_turn(&other)),
    };
    let hasty = faults::check("worker.hasty", At::default()).is_err();
    let patience = Patience::new(several_nodes, Duration::from_secs(first_s), hasty);
    if let Some(group) = &group {
        group.set_timeout(patience.limit())?;
    }
    let training = built.start(&task.data, Peers::new(group))?;
    let (link, done, last) = (link.clone(), resume_step, Step(task.train.steps));
    let may_stop_early = task.train.early_stopping.is_some();
    let gauge = Gauge::new(place.device, task.train.precision, task.parallel.peak_tflops, done)?;
    let reports = Reports::new(place.device, gauge)?;
    let fitting = Fitting::new(task, place);
    let worker = Worker {
        link,
        rank,
        done,
        last,
        training,
        capture,
        replicated,
        patience,
        reports,
        stalled: Duration::ZERO,
        held: None,
        may_stop_early,
        fitting,
    };
    Ok(Started { worker, saves, measure })
}

/// Does `work`, and says how many seconds it took.
fn timed<T>(took_s: &mut f64, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let done = work();
    *took_s = begin.elapsed().as_secs_f64();
    done
}

/// The fingerprint of what all ranks have when they begin: their state, and the base of adapters, which never changes.
fn whole(state: Fingerprint, base: &State) -> Result<Fingerprint> {
    if base.specs().is_empty() {
        return Ok(state);
    }
    let Fingerprint(base) = base.replicated()?.fingerprint()?;
    Ok(Fingerprint(mix(state.0 ^ mix(base))))
}

fn out_of_turn(message: &ToWorker) -> Error {
    let text = format!("{message:?}");
    Error::new(Kind::Bug, format!("agent sent {} out of turn", text.chars().take(40).collect::<String>()))
}

fn listen(link: &Link, at: SocketAddr, limit: Duration) -> Result<torch::Store> {
    let store = torch::Store::serve(&at.ip().to_string(), at.port(), limit)?;
    link.tell(&FromWorker::Listening { port: store.port() });
    Ok(store)
}

/// The group of all ranks, which may have one GPU together (`shared`), and the time from the word where they meet.
/// `served`: the store in which they meet, if it is this one's.
fn meet(
    orders: &mut Orders,
    served: Option<torch::Store>,
    generation: Generation,
    (place, shared): (Place, bool),
    limit: Duration,
) -> Result<(ProcessGroup, Duration)> {
    let (host, port) = match orders.next() {
        ToWorker::Peers { host, port } => (host, port),
        other => return Err(out_of_turn(&other)),
    };
    let begin = Instant::now();
    let store = match served {
        Some(store) => store,
        None => torch::Store::connect(&host, port, limit).context("reach rank 0")?,
    };
    let Place { rank, world, device } = place;
    let prefix = format!("g{generation}");
    let backend = Backend::for_device(device, shared);
    let group = ProcessGroup::new(backend, &store, &prefix, rank, world, limit, device)?;
    // The first collective is part of forming: what fails in it, and the time that it takes, is no step's.
    group.barrier().context("meet all ranks")?;
    Ok((group, begin.elapsed()))
}

fn dataset(data_dir: &Path, data: &DatasetId) -> Result<Dataset> {
    let dataset = Dataset::open(data_dir)?;
    if !identity::is_still(data_dir, &data.index)? {
        let what = format!("the dataset in {} was replaced while it was opened", data_dir.display());
        return Err(Error::new(Kind::Config, what).with_hint("give the same command again, which says what to do"));
    }
    Ok(dataset)
}

/// The run's own task, on the data that its agent found.
fn opened(own: &OwnTask, data: &DatasetId) -> Result<task::Opened> {
    let opened = task::open(own)?;
    if opened.data() != *data {
        let what = format!("the data of task {} was replaced while the run was prepared", own.name);
        return Err(Error::new(Kind::Config, what).with_hint("give the same command again, which says what to do"));
    }
    Ok(opened)
}

fn capture(slots: SlotCount, copies: &[SlotCopy], state: &State, place: Place) -> Result<Capture> {
    let slots = SLOT_FDS.iter().zip(slots.numbers()).map(|(fd, _)| inherited(*fd)).collect::<Result<Vec<_>>>()?;
    let copier = match place.device {
        tch::Device::Cpu => HostCopier::new(COPY_THREADS, true)?,
        _ => HostCopier::new(1, false)?,
    };
    Capture::new(copies, &slots, state.tensors(), copier)
}

fn restore(state: &mut State, slot: u8, files: &[(u64, u64)], weights_only: bool) -> Result<()> {
    let fd =
        SLOT_FDS.get(usize::from(slot)).ok_or_else(|| Error::new(Kind::Bug, format!("there is no slot {slot}")))?;
    state.load(&mapped(*fd, files).context("map the slot to be loaded")?, weights_only)
}

/// Files that lie in inherited memory: each one's first byte and length.
fn mapped(fd: i32, files: &[(u64, u64)]) -> Result<Vec<Bytes>> {
    let memory = |error: std::io::Error| Error::from_source(Kind::Bug, error);
    let mapping = inherited(fd)?.map().map_err(memory)?;
    let bytes = files.iter().map(|&(offset, len)| mapping.bytes(offset..offset.saturating_add(len)));
    bytes.collect::<std::io::Result<_>>().map_err(memory)
}

fn inherited(fd: i32) -> Result<SharedImage> {
    let path = format!("/proc/self/fd/{fd}");
    let file = File::options().read(true).write(true).open(&path);
    let file =
        file.map_err(|error| Error::from_source(Kind::Bug, error).context(format!("open shared memory {path}")))?;
    Ok(SharedImage::inherited(file.into()))
}

fn device_name(device: tch::Device) -> String {
    match device {
        tch::Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}
