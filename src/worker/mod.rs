//! The child process, one per device: it only computes.
//!
//! A worker never talks to the store. Its agent gives it its rank, and it loads its state from shared memory, trains,
//! and copies its share of the state into shared memory when ordered. A LibTorch abort, a CUDA fault or the OOM killer
//! takes one worker; the agent still holds its last snapshot.
//!
//! Threads: the train loop (main), the control thread that answers freezes, and the copy threads. Nothing here is
//! asynchronous. On an error the worker reports what a person should know and exits; on a crash it reports nothing, and
//! the agent learns of it from the end of the process.
//!
//! Bit-equality: with the same world size, threads and device kind, every step's numbers depend on the state and the
//! step alone. Sample order, learning rate and seeds are pure functions of the step; gradient buckets have one fixed
//! layout; the reductions of LibTorch are deterministic for a given number of threads.
#![doc = include_str!("README.md")]

pub mod device;
pub mod gate;
pub mod task;

mod batch;
mod link;
mod load;
mod optim;
mod parallel;
mod partition;
mod schedule;
mod state;

use std::{
    fs::File,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use tch::Tensor;

use self::{
    batch::Batches,
    gate::{Save, StepGate},
    link::Link,
    parallel::Parallel,
    state::State,
    task::Task,
};
use crate::{
    config::{MicroBatches, TrainTask, micro_batches},
    data::{
        Dataset, Sampler, Split, identity,
        sampler::{batch as positions, share},
    },
    error::{Context, Error, Kind, Result},
    faults::{self, At},
    ids::{Rank, Step, WorldSize},
    model::{self, BuildSettings, Model},
    protocol::{Assignment, FromWorker, SLOT_FDS, SaveOrder, StepReport, ToWorker},
    shortage::is_out_of_memory,
    snapshot::{capture::Capture, image::SharedImage, mode::CaptureMode},
    torch::{self, Backend, HostCopier, ProcessGroup},
};

/// How long ranks wait for each other: at the start, and in a collective whose peer is gone.
const PEER_TIMEOUT: Duration = Duration::from_secs(600);
const COPY_THREADS: usize = 2;

/// Runs a worker to its end. Called only in a process started by an agent, never by hand.
pub fn main() -> Result<ExitCode> {
    let (link, mut orders) = link::connect()?;
    let result = Worker::start(&link, &mut orders).and_then(|(worker, saves)| worker.train(orders, &saves));
    match result {
        Ok(never) => match never {},
        Err(error) => {
            // If memory is short now, it may suffice once others have released theirs: the agent decides.
            let permanent = matches!(error.kind(), Kind::Config | Kind::Usage | Kind::Data | Kind::Permission)
                && !is_out_of_memory(&error.to_string());
            let hint = error.hint().map(str::to_owned);
            link.tell(&FromWorker::Failed { message: error.to_string(), hint, permanent });
            link::leave()
        }
    }
}

/// The result of a worker's train loop: it ends only with the process, or with an error.
enum Never {}

struct Worker {
    link: Link,
    config: TrainTask,
    rank: Rank,
    world: WorldSize,
    done: Step,
    model: Box<dyn Model>,
    micro: MicroBatches,
    batches: Batches,
    sampler: Sampler,
    validation: u64,
    parallel: Parallel,
    capture: Capture,
    /// Time spent waiting for captures since the last step report.
    stalled: Duration,
}

fn inherited(fd: i32) -> Result<SharedImage> {
    let path = format!("/proc/self/fd/{fd}");
    let file = File::options().read(true).write(true).open(&path);
    let file =
        file.map_err(|error| Error::from_source(Kind::Bug, error).context(format!("open shared memory {path}")))?;
    Ok(SharedImage::inherited(file.into()))
}

fn out_of_turn(message: &ToWorker) -> Error {
    let text = format!("{message:?}");
    Error::new(Kind::Bug, format!("agent sent {} out of turn", text.chars().take(40).collect::<String>()))
}

impl Worker {
    /// Everything up to the first step.
    fn start(link: &Link, orders: &mut link::Orders) -> Result<(Self, Vec<SaveOrder>)> {
        let assignment: Assignment = match orders.next() {
            ToWorker::Start(assignment) => *assignment,
            other => return Err(out_of_turn(&other)),
        };
        let Assignment { rank, local_rank, world_size: world, resume_step, .. } = assignment;
        let Task { config, data_dir, data } = Task::read(assignment.task)?;
        let train = &config.train;
        torch::set_num_threads(train.threads)?;
        torch::set_interop_threads(1)?;
        torch::set_deterministic(true)?;

        // Rank 0 listens before it does anything slow, so that its peers need not try again.
        let served = if world.get() > 1 && rank == Rank(0) {
            let store = torch::Store::serve("127.0.0.1", PEER_TIMEOUT)?;
            link.tell(&FromWorker::Listening { port: store.port() });
            Some(store)
        } else {
            None
        };

        let device = device::pick(config.parallel.device, local_rank)?;
        // Weights that are to be loaded need not be drawn first.
        let draw = resume_step == Step(0) && config.model.init_from.is_none();
        let settings = BuildSettings { device, precision: train.precision, seed: draw.then_some(train.seed) };
        let mut model = model::build(config.model.kind, &config.model.config, &settings).context("build model")?;
        let split = parallel::split(&config.parallel, model.as_ref(), rank, world);
        let mut state = State::new(model.as_mut(), train.precision, split)?;
        let (tensors, parameters) = (state.specs().to_vec(), state.parameters());
        link.tell(&FromWorker::Built { tensors, device: device_name(device), parameters });

        let dataset = Dataset::open(&data_dir)?;
        if !identity::is_still(&data_dir, &data.index)? {
            let what = format!("the dataset in {} was replaced while it was opened", data_dir.display());
            return Err(Error::new(Kind::Config, what).with_hint("give the same command again, which says what to do"));
        }
        let sampler = Sampler::over(&dataset, Split::Train, config.data.sequence_length, train.seed)?;
        let validation = dataset.samples(Split::Validation, config.data.sequence_length);
        let micro = micro_batches(train.global_batch, world, train.max_micro_batch)?;
        let batches = Batches::new(dataset, config.data.sequence_length, device);

        let mut store = served;
        let mut capture = None;
        let mut group = None;
        let saves = loop {
            match orders.next() {
                ToWorker::Peers { host, port } => {
                    let store = match store.take() {
                        Some(store) => store,
                        None => torch::Store::connect(&host, port, PEER_TIMEOUT).context("reach rank 0")?,
                    };
                    let backend = Backend::for_device(device);
                    let prefix = format!("g{}", assignment.generation);
                    group = Some(ProcessGroup::new(backend, &store, &prefix, rank, world, PEER_TIMEOUT, device)?);
                }
                ToWorker::Layout { plan, base } => {
                    let slots = [inherited(SLOT_FDS[0])?, inherited(SLOT_FDS[1])?];
                    let copier = match device {
                        tch::Device::Cpu => HostCopier::new(COPY_THREADS, true)?,
                        _ => HostCopier::new(1, false)?,
                    };
                    capture = Some(Capture::new(&plan, base, &slots, state.tensors(), copier)?);
                    if draw {
                        link.tell(&FromWorker::Ready);
                    }
                }
                ToWorker::Restore { slot, files, weights_only } => {
                    restore(&mut state, slot, &files, weights_only).context("restore")?;
                    link.tell(&FromWorker::Ready);
                }
                ToWorker::Go { saves } => break saves,
                other => return Err(out_of_turn(&other)),
            }
        };
        let capture = capture.ok_or_else(|| Error::new(Kind::Bug, "agent sent no layout"))?;
        if group.is_none() && world.get() > 1 {
            return Err(Error::new(Kind::Bug, "agent named no peers"));
        }
        let group = group.filter(|_| world.get() > 1);
        let parallel = Parallel::new(&config.parallel, train.optimizer, model.as_ref(), &state, group)?;
        let worker = Self {
            link: link.clone(),
            rank,
            world,
            done: resume_step,
            model,
            micro,
            batches,
            sampler,
            validation,
            parallel,
            capture,
            stalled: Duration::ZERO,
            config,
        };
        Ok((worker, saves))
    }

    /// The train loop: readable from here to its end.
    fn train(mut self, orders: link::Orders, saves: &[SaveOrder]) -> Result<Never> {
        let gate = Arc::new(StepGate::new(self.done, Step(self.config.train.steps)));
        gate.thaw(saves, None);
        orders.serve(self.link.clone(), Arc::clone(&gate))?;
        let mut begin = Instant::now();
        loop {
            // Between two steps: the state is that of step `done`.
            let boundary = gate.enter(self.done);
            if let Some(save) = boundary.save {
                self.save(save)?;
            }
            if !boundary.proceed {
                break;
            }
            let step = self.done.next();
            faults::check("worker.step", At { rank: Some(self.rank.get()), step: Some(step.get()) })
                .map_err(injected)?;

            let (loss, data) = self.forward_backward(step)?;
            // The last moment at which the state of step `done` still stands.
            self.finish_capture()?;
            let lr = schedule::learning_rate(
                &self.config.train.schedule,
                self.config.train.optimizer.lr,
                step,
                self.config.train.steps,
            );
            let norm = self.parallel.step(step, lr)?;
            self.parallel.zero_grad()?;

            let report = StepReport {
                step,
                loss: torch::to_f64(&loss)?,
                grad_norm: torch::to_f64(&norm)?,
                lr,
                step_s: begin.elapsed().as_secs_f64(),
                stall_s: std::mem::take(&mut self.stalled).as_secs_f64(),
                data_s: data.as_secs_f64(),
            };
            begin = Instant::now();
            self.link.tell(&FromWorker::Step(report));
            self.done = step;
            if self.validation_is_due() {
                self.validate(&gate)?;
                begin = Instant::now();
            }
        }
        self.finish_capture()?;
        // Peers may be told to exit once all have stopped: by then they must have sent everything that this rank waits
        // for.
        self.parallel.settle()?;
        self.link.tell(&FromWorker::Stopped { step: self.done });
        // The state stays as it is, so its save may be ordered when a slot becomes free. The control thread ends the
        // process.
        loop {
            let save = gate.wait_for_last_save(self.done);
            self.save(save)?;
            self.finish_capture()?;
        }
    }

    /// Gradients of `step`, reduced under the last backward; returns the mean loss over this rank's sequences, and the
    /// time spent reading data.
    fn forward_backward(&mut self, step: Step) -> Result<(Tensor, Duration)> {
        // Generators are seeded for each step, so that their state is a function of (seed, step, rank) on any world
        // size.
        torch::manual_seed(step_seed(self.config.train.seed, step, self.rank))?;
        let mut cursor = positions(step, self.config.train.global_batch, self.rank, self.world);
        let mut total: Option<Tensor> = None;
        let mut data = Duration::ZERO;
        for micro in 0..self.micro.accumulate {
            let reading = Instant::now();
            let (sampler, first) = (self.sampler, cursor.start);
            cursor.start += u64::from(self.micro.micro_batch);
            let samples = (0..self.micro.micro_batch).map(|i| sampler.sample_at(first + u64::from(i)).1);
            let tokens = self.batches.read(Split::Train, samples)?;
            data += reading.elapsed();

            // The weights are read from here on.
            self.parallel.settle()?;
            let loss = self.model.loss(&tokens)?;
            let loss = torch::tch_result("scale loss", loss.f_div_scalar(f64::from(self.micro.accumulate)))?;
            self.parallel.backward(&loss, micro + 1 == self.micro.accumulate)?;
            let loss = loss.detach();
            total = Some(match total {
                None => loss,
                Some(sum) => torch::tch_result("sum losses", sum.f_add(&loss))?,
            });
        }
        let total = total.ok_or_else(|| Error::new(Kind::Bug, "a step without a micro-batch"))?;
        Ok((total, data))
    }

    fn save(&mut self, Save { slot, mode }: Save) -> Result<()> {
        let (link, step) = (self.link.clone(), self.done);
        self.finish_capture()?;
        self.parallel.settle()?;
        self.capture.start(slot, move |copy| {
            link.tell(&FromWorker::Captured { step, slot, copy_s: copy.as_secs_f64() });
        })?;
        match mode {
            CaptureMode::Overlap => Ok(()),
            CaptureMode::Blocking => self.finish_capture(),
        }
    }

    /// Waits for the capture under way, if there is one.
    fn finish_capture(&mut self) -> Result<()> {
        if let Some(stall) = self.capture.wait()? {
            self.stalled += stall;
            self.link.tell(&FromWorker::Stalled { step: self.done, stall_s: stall.as_secs_f64() });
        }
        Ok(())
    }

    fn validation_is_due(&self) -> bool {
        let (every, done) = (self.config.data.validation_every, self.done.get());
        self.validation > 0 && every > 0 && (done.is_multiple_of(every) || done == self.config.train.steps)
    }

    /// The held-out loss over this rank's share; abandoned at once when the run is to end.
    fn validate(&mut self, gate: &StepGate) -> Result<()> {
        let count = self.validation.min(u64::from(self.config.data.validation_sequences));
        let mut samples = share(count, self.rank, self.world);
        self.parallel.settle()?;
        let (mut loss_sum, mut sequences) = (0.0, 0);
        while !samples.is_empty() {
            if gate.is_ending(self.done) && self.done.get() < self.config.train.steps {
                return Ok(());
            }
            let end = (samples.start + u64::from(self.config.train.max_micro_batch)).min(samples.end);
            let (first, len) = (samples.start, (end - samples.start) as u32);
            samples.start = end;
            let tokens = self.batches.read(Split::Validation, (0..len).map(|i| first + u64::from(i)))?;
            let loss = tch::no_grad(|| self.model.loss(&tokens))?;
            loss_sum += torch::to_f64(&loss)? * f64::from(len);
            sequences += u64::from(len);
        }
        self.link.tell(&FromWorker::Validated { step: self.done, loss_sum, sequences });
        Ok(())
    }
}

fn restore(state: &mut State, slot: u8, files: &[(u64, u64)], weights_only: bool) -> Result<()> {
    let memory = |error: std::io::Error| Error::from_source(Kind::Bug, error).context("map the slot to be loaded");
    let fd =
        SLOT_FDS.get(usize::from(slot)).ok_or_else(|| Error::new(Kind::Bug, format!("there is no slot {slot}")))?;
    let mapping = inherited(*fd)?.map().map_err(memory)?;
    let files = files
        .iter()
        .map(|&(offset, len)| mapping.bytes(offset..offset.saturating_add(len)))
        .collect::<std::io::Result<Vec<_>>>()
        .map_err(memory)?;
    state.load(&files, weights_only)
}

fn device_name(device: tch::Device) -> String {
    match device {
        tch::Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}

fn injected(fault: faults::Injected) -> Error {
    Error::from_source(Kind::Bug, fault)
}

/// The seed of a step's generators on one rank.
fn step_seed(seed: u64, step: Step, rank: Rank) -> u64 {
    // SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): neighbouring steps get unrelated seeds.
    let mut z = seed ^ step.get().wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(rank.get()) << 48);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
