//! Whether a run fits into the memory of its GPUs and of its machine: the formula of `train::memory` beside what is
//! there, and what to change where it does not fit. Pure but for [`Gpu::found`].

use serde::Serialize;

use super::verdict::Line;
use crate::{
    cloud::instances::GpuSet,
    config::{Activations, Precision, Strategy, TrainConfig, TrainTask},
    error::{Error, Kind, Result},
    ids::{SlotCount, WorldSize},
    model::memory::{Extents, Plan},
    report::human,
    torch,
    train::memory::{Forecast, PROCESS, Setting, fits},
};

const HOST: &str = "memory";
const GPU: &str = "gpu memory";

/// The GPU that each worker has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gpu {
    /// Its name, or who says so.
    pub name: String,
    /// All of its memory.
    pub bytes: u64,
}

impl Gpu {
    /// The first one of this machine. Loads the driver.
    pub fn found() -> Result<Option<Self>> {
        let device = tch::Device::Cuda(0);
        if torch::device_count()? == 0 {
            return Ok(None);
        }
        let (kind, memory) = (torch::device_kind(device)?, torch::device_memory(device)?);
        Ok(kind.zip(memory).map(|(kind, memory)| Self { name: kind.name, bytes: memory.total }))
    }

    /// One of an instance type's.
    pub fn of(set: &GpuSet, instance_type: &str) -> Self {
        Self { name: format!("{} of {instance_type}", set.name), bytes: set.bytes }
    }
}

/// The workers of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Workers {
    /// Of one node.
    pub here: u32,
    /// Nodes.
    pub nodes: u32,
}

impl Workers {
    const fn world(self) -> WorldSize {
        WorldSize(self.here.saturating_mul(self.nodes))
    }
}

/// What a run needs, in numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Account {
    /// Bytes that there are: of one GPU, or of the host.
    pub available: u64,
    /// Of them, those that one worker's tensors may have.
    pub room: u64,
    /// Workers of all nodes.
    pub workers: u32,
    /// Sequences of a pass.
    pub micro_batch: u32,
    /// Tokens of a sequence.
    pub sequence_length: u32,
    /// Bytes that each worker needs there beside its tensors.
    pub process: u64,
    /// Snapshot slots; 0 on a GPU.
    pub slots: u8,
    /// Bytes of one of them.
    pub slot: u64,
    /// Bytes of the weights that adapters are trained beside, in the host's memory.
    pub base: u64,
    /// The need of one worker under each strategy; empty where its tensors are elsewhere.
    pub strategies: Vec<Row>,
}

/// One strategy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its name.
    pub strategy: Strategy,
    /// Whether the configuration says so.
    pub is_chosen: bool,
    /// What passes keep under it.
    pub activations: Activations,
    /// The need of one worker.
    #[serde(flatten)]
    pub forecast: Forecast,
    /// The largest micro-batch that fits; 0: none does.
    pub largest_micro_batch: u32,
    /// Bytes that one more sequence needs; `None`: all sequences of a worker fit into one pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beyond: Option<u64>,
}

/// A language model's run, as far as its memory is concerned.
#[derive(Debug)]
pub(super) struct Run<'a> {
    task: &'a TrainTask,
    plan: Plan,
    workers: Workers,
    /// Sequences may hold several documents.
    is_packed: bool,
}

impl<'a> Run<'a> {
    /// An error for a model that can't be built.
    pub fn of(task: &'a TrainTask, workers: Workers, is_packed: bool) -> Result<Self> {
        Ok(Self { task, plan: Plan::of(&task.model)?, workers, is_packed })
    }

    fn setting(&self, on_gpu: bool) -> Result<Setting<'_>> {
        let setting = Setting::of(self.task, &self.plan, self.workers.world(), on_gpu)?;
        Ok(Setting { extents: Extents { packed: self.is_packed, ..setting.extents }, ..setting })
    }

    /// The most sequences that a worker has in a step.
    fn most(&self) -> u32 {
        self.task.train.global_batch.div_ceil(self.workers.world().get().max(1))
    }

    /// Each strategy that the run may have, given the bytes for its tensors. Those of a world of one are the same.
    fn rows(&self, setting: &Setting<'_>, room: u64) -> Vec<Row> {
        let is_possible = |strategy: Strategy| match strategy {
            _ if setting.world.get() <= 1 => strategy == setting.strategy,
            Strategy::Shard => self.workers.nodes <= 1 && !self.plan.has_adapters(),
            Strategy::Ddp | Strategy::Zero1 => true,
        };
        let all = [Strategy::Ddp, Strategy::Zero1, Strategy::Shard];
        let rows = all.into_iter().filter(|strategy| is_possible(*strategy)).map(|strategy| {
            let fit = fits(&Setting { strategy, ..*setting }, self.most(), room);
            let is_staged = strategy == Strategy::Shard && setting.world.get() > 1;
            Row {
                strategy,
                is_chosen: strategy == setting.strategy,
                activations: if is_staged { Activations::Block } else { setting.activations },
                forecast: fit.forecast,
                largest_micro_batch: fit.largest,
                beyond: fit.beyond,
            }
        });
        rows.collect()
    }

    fn account(&self, setting: &Setting<'_>, available: u64, room: u64, process: u64) -> Account {
        Account {
            available,
            room,
            workers: setting.world.get(),
            micro_batch: setting.extents.sequences,
            sequence_length: setting.extents.length,
            process,
            slots: 0,
            slot: 0,
            base: 0,
            strategies: self.rows(setting, room),
        }
    }

    /// Whether a worker fits on its GPU.
    pub fn on_gpu(&self, gpu: &Gpu) -> Result<Line> {
        let setting = self.setting(true)?;
        let room = gpu.bytes.saturating_sub(PROCESS.gpu);
        let account = self.account(&setting, gpu.bytes, room, PROCESS.gpu);
        let of = format!("{} of {}", human::bytes(gpu.bytes), gpu.name);
        Ok(self.line(GPU, &setting, account, &of))
    }

    /// Whether the slots and, on a CPU, the workers fit into what the host has.
    pub fn on_host(&self, slots: SlotCount, available: u64, on_gpu: bool) -> Result<Line> {
        let setting = self.setting(on_gpu)?;
        let slot = setting.slot_bytes()?;
        let base = if self.plan.has_adapters() { setting.base_bytes() } else { 0 };
        let here = u64::from(self.workers.here);
        let beside = slot * u64::from(slots.get()) + base + PROCESS.host * here;
        if on_gpu {
            let host = Host { slots, slot, base, tensors: 0, workers: self.workers.here };
            let account = self.account(&setting, available, 0, PROCESS.host);
            let account = Account { slots: slots.get(), slot, base, strategies: Vec::new(), ..account };
            return Ok(Line { memory: Some(Box::new(account)), ..host.line(available) });
        }
        let room = available.saturating_sub(beside) / here.max(1);
        let account = self.account(&setting, available, room, PROCESS.host);
        let tensors = account.chosen().map_or(0, |row| row.forecast.bytes) * here;
        let host = Host { slots, slot, base, tensors, workers: self.workers.here };
        let mut line = host.line(available);
        let account = Account { slots: slots.get(), slot, base, ..account };
        if line.kind.is_some() {
            let others = self.others(&setting, &account);
            if !others.is_empty() {
                line.todo = Some(format!("{}; or {}", others.join("; or "), line.todo.unwrap_or_default()));
            }
        } else if let Some(fitting) = account.chosen().map(|row| largest(row, account.micro_batch)) {
            line.found = format!("{}; micro-batch {}{fitting}", line.found, account.micro_batch);
        }
        Ok(Line { memory: Some(Box::new(account)), ..line })
    }

    fn line(&self, check: &'static str, setting: &Setting<'_>, account: Account, of: &str) -> Line {
        let Some(row) = account.chosen() else { return Line::skipped(check, "no strategy is named") };
        let need = row.forecast.bytes + account.process;
        let micro_batch = account.micro_batch;
        let found =
            format!("micro-batch {micro_batch} needs {} of {of}{}", human::bytes(need), largest(row, micro_batch));
        let line = if need > account.available {
            let mut todo = self.others(setting, &account);
            todo.push(
                "use GPUs with more memory, more workers with zero1 or shard, adapters ([model.lora]), or a smaller \
                 model"
                    .to_owned(),
            );
            Line::fail(check, Kind::Config, found, todo.join("; or "))
        } else if need > account.available / 20 * 19 {
            Line::warn(check, found, "little is left for memory that the allocator can't use: leave a twentieth free")
        } else {
            Line::ok(check, found)
        };
        Line { memory: Some(Box::new(account)), ..line }
    }

    /// What makes a run fit that does not: a smaller micro-batch, or other settings with the one that is named.
    fn others(&self, setting: &Setting<'_>, account: &Account) -> Vec<String> {
        let mut others = Vec::new();
        let wanted = account.micro_batch;
        if let Some(row) = account.chosen()
            && (1..wanted).contains(&row.largest_micro_batch)
        {
            let most = row.largest_micro_batch;
            others.push(format!("--set train.max_micro_batch={most}, which leaves the global batch as it is"));
        }
        let mut fitting = |words: &str, setting: Setting<'_>| {
            let largest = fits(&setting, wanted, account.room).largest;
            if largest > 0 {
                others.push(format!("{words}, with which micro-batch {largest} fits"));
            }
            largest == wanted
        };
        if setting.activations == Activations::Keep
            && fitting("--set train.activations=block", Setting { activations: Activations::Block, ..*setting })
        {
            return others;
        }
        for row in account.strategies.iter().filter(|row| !row.is_chosen) {
            let activations = Activations::Block;
            let words = match (row.strategy, setting.activations) {
                (Strategy::Shard, _) => "--set parallel.strategy=shard".to_owned(),
                (strategy, Activations::Keep) => {
                    format!("--set parallel.strategy={} --set train.activations=block", strategy_name(strategy))
                }
                (strategy, _) => format!("--set parallel.strategy={}", strategy_name(strategy)),
            };
            if fitting(&words, Setting { strategy: row.strategy, activations, ..*setting }) {
                break;
            }
        }
        others
    }
}

impl Account {
    /// The strategy that the configuration names.
    pub fn chosen(&self) -> Option<&Row> {
        self.strategies.iter().find(|row| row.is_chosen)
    }
}

/// The largest micro-batch that fits, and what the next one needs.
fn largest(row: &Row, micro_batch: u32) -> String {
    let beyond = |next: u32| {
        row.beyond.map(|bytes| format!("; {next} needs {} beside the process", human::bytes(bytes))).unwrap_or_default()
    };
    match row.largest_micro_batch {
        0 => "; not even 1 fits".to_owned(),
        largest if largest == micro_batch => format!(" fits{}", beyond(largest + 1)),
        largest => format!("; {largest} fits{}", beyond(largest + 1)),
    }
}

/// A strategy's word in a configuration.
pub const fn strategy_name(strategy: Strategy) -> &'static str {
    match strategy {
        Strategy::Ddp => "ddp",
        Strategy::Zero1 => "zero1",
        Strategy::Shard => "shard",
    }
}

/// Bytes of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Host {
    slots: SlotCount,
    /// Of one slot.
    slot: u64,
    /// Of the weights that adapters are trained beside.
    base: u64,
    /// Of all workers' tensors.
    tensors: u64,
    workers: u32,
}

impl Host {
    fn line(&self, available: u64) -> Line {
        let Self { slots: count, slot, base, tensors, workers } = *self;
        let slots = slot.saturating_mul(count.get().into());
        let processes = PROCESS.host.saturating_mul(workers.into());
        let all = slots.saturating_add(base).saturating_add(tensors).saturating_add(processes);
        let part = |bytes: u64, of: &str| match bytes {
            0 => String::new(),
            bytes => format!(", {} for {of}", human::bytes(bytes)),
        };
        let found = format!(
            "{} available; a run takes about {}: {} for {}{}, {} for LibTorch in {}{}",
            human::bytes(available),
            human::bytes(all),
            human::bytes(slots),
            if count == SlotCount::ONE { "one snapshot slot" } else { "two snapshot slots" },
            part(tensors, "workers' tensors"),
            human::bytes(processes),
            human::plural(workers.into(), "worker"),
            part(base, "the files of model.init_from"),
        );
        if all > available {
            let todo =
                "use a machine with more memory, fewer workers, or a smaller model; in a container, raise its limit";
            let todo = if count != SlotCount::ONE && all - slot <= available {
                format!("--set checkpoint.slots=1 halves what the slots take; or {todo}")
            } else {
                todo.to_owned()
            };
            return Line::fail(HOST, Kind::Config, found, todo);
        }
        if all > available / 10 * 9 {
            return Line::warn(HOST, found, "little is left for the page cache and for everything else");
        }
        Line::ok(HOST, found)
    }
}

/// Whether a program's own task fits: its state, and on a CPU what its workers have of it. What its passes keep is not
/// known.
pub(super) fn of_task(
    elements: u64,
    train: &TrainConfig,
    workers: Workers,
    slots: SlotCount,
    available: u64,
    on_gpu: bool,
) -> Line {
    let is_rounded = train.precision == Precision::Bf16;
    let slot = elements.saturating_mul(if is_rounded { 14 } else { 12 });
    let each = elements.saturating_mul(if is_rounded { 18 } else { 16 });
    let tensors = if on_gpu { 0 } else { each.saturating_mul(workers.here.into()) };
    Host { slots, slot, base: 0, tensors, workers: workers.here }.line(available)
}

/// Where there is no model to compare memory with.
pub(super) fn of_nothing(available: u64) -> Line {
    let found = format!("{} available; give CONFIG to compare it with a model's need", human::bytes(available));
    Line::skipped(HOST, found)
}

/// The kernel does not say how much there is.
pub(super) fn of_unknown() -> Line {
    Line::skipped(HOST, "the kernel does not report it")
}

/// A GPU's memory is named, and nothing to compare it with.
pub(super) fn of_gpu_alone() -> Line {
    Line::skipped(GPU, "give CONFIG to compare --gpu-memory with a model's need")
}

/// An error on the way.
pub(super) fn failed(on_gpu: bool, error: &Error) -> Line {
    Line::error(if on_gpu { GPU } else { HOST }, error)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            testing::{FAIL, OK, WARN, is},
            verdict::Verdict,
        },
        *,
    };

    const GIB: u64 = 1 << 30;

    fn task(model: &str, strategy: Strategy, activations: Activations) -> TrainTask {
        let mut task = crate::checkpoint::testing::config().workload;
        task.model.config = serde_json::from_str(model).unwrap();
        (task.train.precision, task.train.activations) = (Precision::Bf16, activations);
        (task.data.sequence_length, task.parallel.strategy) = (2048, strategy);
        task
    }

    const SMALL: &str = include_str!("../../configs/models/llama-1b.json");
    const LARGE: &str = include_str!("../../configs/models/llama-8b.json");

    fn asked(task: &TrainTask, here: u32, gib: u64) -> Line {
        let gpu = Gpu { name: "a GPU".into(), bytes: gib * GIB };
        Run::of(task, Workers { here, nodes: 1 }, false).unwrap().on_gpu(&gpu).unwrap()
    }

    #[test]
    fn the_micro_batch_that_fits_is_named_and_what_one_more_needs() {
        let task = task(SMALL, Strategy::Ddp, Activations::Keep);
        let line = asked(&task, 1, 141);
        assert_eq!(is(&line), OK, "{line:?}");
        let account = line.memory.clone().unwrap();
        let [row] = account.strategies.as_slice() else { panic!("{account:?}") };
        assert_eq!((account.micro_batch, account.workers, row.is_chosen), (8, 1, true));
        assert!(row.largest_micro_batch >= 8 && row.beyond.is_none_or(|bytes| bytes > account.room), "{row:?}");
        assert!(row.forecast.bytes <= account.room);
        assert!(line.found.contains("micro-batch 8 needs") && line.found.contains("of 141 GiB of a GPU"), "{line:?}");

        // What fits, fits; one more does not.
        for gib in [24, 32, 48, 80] {
            let line = asked(&task, 1, gib);
            let account = line.memory.clone().unwrap();
            let row = account.chosen().unwrap().clone();
            let run = Run::of(&task, Workers { here: 1, nodes: 1 }, false).unwrap();
            let needs = |sequences| run.setting(true).unwrap().with_sequences(sequences).forecast().bytes;
            let largest = row.largest_micro_batch;
            assert!(largest == 0 || needs(largest) <= account.room, "{gib}: {line:?}");
            assert!(row.beyond.is_none_or(|beyond| beyond == needs(largest + 1) && beyond > account.room), "{gib}");
            assert_eq!(line.verdict == Verdict::Fail, largest < 8, "{gib}: {line:?}");
            if (1..8).contains(&largest) {
                let todo = line.todo.unwrap();
                assert!(todo.starts_with(&format!("--set train.max_micro_batch={largest}, which")), "{todo}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_settings_that_do() {
        let run = |strategy, activations, here, gib| asked(&task(LARGE, strategy, activations), here, gib);
        let line = run(Strategy::Ddp, Activations::Keep, 8, 80);
        assert_eq!(is(&line), FAIL);
        let todo = line.todo.clone().unwrap();
        assert!(todo.contains("--set parallel.strategy=") && todo.contains("micro-batch 4 fits"), "{todo}");
        assert!(line.found.contains("not even 1 fits"), "{line:?}");
        // One GPU has no room for the state of 8 thousand million parameters, whatever is set.
        let line = run(Strategy::Ddp, Activations::Block, 1, 80);
        assert_eq!(is(&line), FAIL);
        assert!(line.todo.as_ref().is_some_and(|todo| todo.starts_with("use GPUs with more memory")), "{line:?}");
        let line = run(Strategy::Shard, Activations::Keep, 8, 80);
        assert_eq!(is(&line), OK, "{line:?}");
        let names: Vec<_> = line.memory.unwrap().strategies.iter().map(|row| (row.strategy, row.is_chosen)).collect();
        assert_eq!(names, [(Strategy::Ddp, false), (Strategy::Zero1, false), (Strategy::Shard, true)]);
    }

    #[test]
    fn little_room_is_a_warning() {
        let task = task(SMALL, Strategy::Ddp, Activations::Block);
        let bytes = asked(&task, 1, 141).memory.unwrap().chosen().unwrap().forecast.bytes + PROCESS.gpu;
        let gpu = |bytes| Gpu { name: "a GPU".into(), bytes };
        let run = Run::of(&task, Workers { here: 1, nodes: 1 }, false).unwrap();
        assert_eq!(is(&run.on_gpu(&gpu(bytes)).unwrap()), WARN);
        assert_eq!(is(&run.on_gpu(&gpu(bytes - 1)).unwrap()), FAIL);
        assert_eq!(is(&run.on_gpu(&gpu(bytes / 9 * 10)).unwrap()), OK);
    }

    #[test]
    fn the_slots_and_the_workers_must_fit() {
        let host = |slots| Host { slots, slot: 10 * GIB, base: GIB, tensors: 4 * GIB, workers: 2 };
        // 1 GiB for the workers' processes.
        for (available, expected) in [(20, FAIL), (25, FAIL), (26, WARN), (29, OK), (0, FAIL)] {
            assert_eq!(is(&host(SlotCount::TWO).line(available * GIB)), expected, "{available}");
        }
        for (available, expected) in [(15, FAIL), (17, WARN), (20, OK)] {
            assert_eq!(is(&host(SlotCount::ONE).line(available * GIB)), expected, "{available}");
        }
        let todo = |count, gib: u64| format!("{:?}", host(count).line(gib * GIB)).contains("checkpoint.slots=1");
        assert!(todo(SlotCount::TWO, 20), "one slot fits");
        assert!(!todo(SlotCount::TWO, 14) && !todo(SlotCount::ONE, 14), "not even that");
    }

    #[test]
    fn a_node_needs_its_slots_and_on_a_cpu_its_workers() {
        let task = task(SMALL, Strategy::Ddp, Activations::Keep);
        let run = Run::of(&task, Workers { here: 2, nodes: 1 }, false).unwrap();
        let line = run.on_host(SlotCount::TWO, 1000 * GIB, false).unwrap();
        assert_eq!(is(&line), OK);
        let account = line.memory.unwrap();
        let elements: u64 = run.plan.parameters().iter().map(|it| it.elements()).sum();
        // 14 bytes a parameter, headers and pages.
        assert!((elements * 14..elements * 14 + (1 << 20)).contains(&account.slot), "{account:?}");
        let beside = 2 * account.slot + 2 * PROCESS.host;
        assert_eq!(account.room, (1000 * GIB - beside) / 2);
        let bytes = account.chosen().unwrap().forecast.bytes;
        assert_eq!(is(&run.on_host(SlotCount::TWO, beside + 2 * bytes, false).unwrap()), WARN);
        let short = run.on_host(SlotCount::TWO, beside + 2 * bytes - 2, false).unwrap();
        assert_eq!(is(&short), FAIL);
        assert!(short.todo.is_some_and(|todo| todo.contains("--set train.max_micro_batch=")));
        // The workers of GPUs are elsewhere.
        assert_eq!(is(&run.on_host(SlotCount::TWO, beside + GIB, true).unwrap()), WARN);
        assert_eq!(is(&run.on_host(SlotCount::TWO, beside - 1, true).unwrap()), FAIL);
    }

    #[test]
    fn a_task_needs_its_state() {
        let task = task(SMALL, Strategy::Ddp, Activations::Keep);
        let of = |elements, gib: u64, on_gpu| {
            let workers = Workers { here: 1, nodes: 1 };
            is(&of_task(elements, &task.train, workers, SlotCount::ONE, gib * GIB, on_gpu))
        };
        // 14 bytes in the slot, 18 in the worker.
        assert_eq!((of(GIB, 20, true), of(GIB, 20, false), of(GIB, 40, false)), (OK, FAIL, OK));
        assert_eq!(of(u64::MAX, 40, false), FAIL);
    }
}
