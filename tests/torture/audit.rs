//! The promises about a run's store, checked from outside, without the product's own readers.
//!
//! Records are plain JSON here, and the few lines at the foot compute checksums. The auditor remembers each audit: the
//! next one demands that no record has changed or disappeared, and that all runs of the campaign store the same bytes
//! for the state after a step.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
};

use serde_json::Value;

use super::plan::Sharing;
use crate::support::lab::{Lab, Store};

/// The broken promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    /// A committed checkpoint is missing, or not whole.
    LostCheckpoint,
    /// A life continued from another state than the newest checkpoint's.
    DamagedResume,
    /// Two writers committed, or one committed twice.
    DoubleCommit,
    /// Anything else.
    Other,
}

/// A broken promise.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Its kind.
    pub promise: Promise,
    /// Its description, for a person.
    pub how: String,
}

impl std::fmt::Display for Violation {
    /// Its first line: the output of the processes is in the stored story.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}: {}", self.promise, self.how.lines().next().unwrap_or_default())
    }
}

/// The result of a check.
pub type Checked<T = ()> = Result<T, Violation>;

/// A violation, unless the condition holds.
pub fn demand(holds: bool, promise: Promise, how: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(Violation { promise, how: how() }) }
}

/// A checkpoint of the journal: step, then generation.
pub type Place = (u64, u64);

/// A `formed` record.
#[derive(Clone, Debug)]
pub struct Formed {
    /// Its generation.
    pub generation: u64,
    /// What it resumes from.
    pub resume: Option<Place>,
    /// Its nodes, the leader first.
    pub roster: Vec<String>,
    /// Workers of all its nodes.
    pub world: u64,
}

/// Who may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writers {
    /// One node at a time, with N workers.
    One(u32),
    /// At most N nodes at a time, with one worker each.
    Group(u32),
}

/// A run according to its journal.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Generations, in order.
    pub formed: Vec<Formed>,
    /// Every checkpoint ever committed, in order.
    pub committed: Vec<Place>,
    /// The remaining ones: key of the manifest, and its checksum.
    pub standing: BTreeMap<Place, (String, String)>,
    /// The step of the `completed` record.
    pub completed: Option<u64>,
    /// The reason of the last `failed` record.
    pub failed: Option<String>,
    /// Interrupted generations: generation, last step, lost steps.
    pub interrupted: Vec<(u64, u64, u64)>,
    /// Nodes that a generation has left out: their names are used up.
    left_out: BTreeSet<String>,
}

impl View {
    /// The newest checkpoint.
    pub fn newest(&self) -> Option<Place> {
        self.committed.last().copied()
    }
    /// The newest checkpoint's step, 0 without one.
    pub fn newest_step(&self) -> u64 {
        self.newest().map_or(0, |(step, _)| step)
    }
    /// The newest generation, 0 without one.
    pub fn generation(&self) -> u64 {
        self.formed.last().map_or(0, |formed| formed.generation)
    }
    /// The nodes of the newest generation, the leader first.
    fn roster(&self) -> &[String] {
        self.formed.last().map_or(&[], |formed| &formed.roster)
    }
    /// The ranks of every generation up to and with this one, if they are the same.
    fn world_until(&self, generation: u64) -> Option<u64> {
        let mut worlds = self.formed.iter().filter(|formed| formed.generation <= generation).map(|formed| formed.world);
        let first = worlds.next()?;
        worlds.all(|world| world == first).then_some(first)
    }
}

/// Name, size and checksum of every file of a checkpoint.
type State = Vec<(String, u64, String)>;

/// Runs whose states are the same: those with the same settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    One(Sharing),
    Groups,
    /// No other run.
    Alone,
}

impl Default for Family {
    fn default() -> Self {
        Self::One(Sharing::default())
    }
}

/// The state after each step on each number of ranks, as first seen in any run of a family.
static STATES: Mutex<BTreeMap<(Family, u64, u64), State>> = Mutex::new(BTreeMap::new());

/// How often a living run must show the same broken promise: what is deleted or written meanwhile shows once.
const LOOKS: usize = 5;

/// Checks one run again and again.
#[derive(Debug, Default)]
pub struct Auditor {
    journal: Vec<Vec<u8>>,
    family: Family,
}

impl Auditor {
    /// For a run of one node whose ranks share the state so.
    pub fn of(sharing: Sharing) -> Self {
        Self { family: Family::One(sharing), ..Self::default() }
    }

    /// For a run with settings of its own.
    pub fn apart() -> Self {
        Self { family: Family::Alone, ..Self::default() }
    }

    /// For a run with the settings of groups.
    pub fn of_groups() -> Self {
        Self { family: Family::Groups, ..Self::default() }
    }

    /// Reads the whole store of a run on which no agent is at work.
    pub fn audit(&mut self, lab: &Lab, run: &str, ranks: u32) -> Checked<View> {
        self.look(lab, run, Writers::One(ranks))
    }

    /// The same of a run of at most `most` nodes with one worker each; they may be at work.
    pub fn audit_group(&mut self, lab: &Lab, run: &str, most: u32) -> Checked<View> {
        let mut last = self.look(lab, run, Writers::Group(most));
        for _ in 1..LOOKS {
            if last.is_ok() {
                break;
            }
            last = self.look(lab, run, Writers::Group(most));
        }
        last
    }

    fn look(&mut self, lab: &Lab, run: &str, writers: Writers) -> Checked<View> {
        let view = self.read_journal(lab, run, writers)?;
        for &(step, generation) in view.standing.keys() {
            let state = whole_checkpoint(lab, run, &view, (step, generation))?;
            let Some(world) = view.world_until(generation).filter(|_| self.family != Family::Alone) else { continue };
            let mut states = STATES.lock().unwrap_or_else(PoisonError::into_inner);
            let first = states.entry((self.family, world, step)).or_insert_with(|| state.clone());
            demand(*first == state, Promise::DamagedResume, || {
                format!("step {step} of generation {generation} holds {state:?}; others had {first:?}")
            })?;
        }
        Ok(view)
    }

    fn read_journal(&mut self, lab: &Lab, run: &str, writers: Writers) -> Checked<View> {
        let mut numbers: Vec<u64> = lab.keys(run, "journal/").iter().filter_map(|key| number(key)).collect();
        numbers.sort_unstable();
        demand(numbers.iter().copied().eq(0..numbers.len() as u64), Promise::LostCheckpoint, || {
            format!("the journal is not numbered without a gap: {numbers:?}")
        })?;
        demand(numbers.len() >= self.journal.len(), Promise::LostCheckpoint, || {
            format!("the journal had {} records and has {}", self.journal.len(), numbers.len())
        })?;
        let mut view = View::default();
        for number in numbers {
            let bytes = lab.read(run, &format!("journal/{number:020}.json"));
            match self.journal.get(number as usize) {
                Some(before) => demand(*before == bytes, Promise::LostCheckpoint, || {
                    let text = String::from_utf8_lossy;
                    format!("journal record {number} has changed from {} to {}", text(before), text(&bytes))
                })?,
                None => self.journal.push(bytes.clone()),
            }
            view.apply(number, &bytes, writers)?;
        }
        Ok(view)
    }
}

/// The number of a journal key of the documented form; hidden files of writers that were killed have other names.
fn number(key: &str) -> Option<u64> {
    let digits = key.strip_prefix("journal/")?.strip_suffix(".json")?;
    (digits.len() == 20).then(|| digits.parse().ok())?
}

impl View {
    fn prune(&mut self, number: u64, place: Place) -> Checked {
        demand(Some(place) != self.newest(), Promise::LostCheckpoint, || {
            format!("journal record {number} prunes {place:?}, the newest checkpoint")
        })?;
        let resumed = self.formed.last().and_then(|formed| formed.resume);
        demand(Some(place) != resumed || self.completed.is_some(), Promise::LostCheckpoint, || {
            format!("journal record {number} prunes {place:?}, which the newest generation resumed from")
        })?;
        demand(self.standing.remove(&place).is_some(), Promise::LostCheckpoint, || {
            format!("journal record {number} prunes {place:?}, which does not exist")
        })
    }

    /// A new generation of `node`.
    fn form(&mut self, node: &str, record: &Value, writers: Writers) -> Checked {
        let wrong = |how: &str| Violation { promise: Promise::Other, how: format!("{how}: {record}") };
        let generation = record["generation"].as_u64().unwrap_or_default();
        demand(generation == self.generation() + 1, Promise::DoubleCommit, || {
            format!("generation {generation} follows {}", self.generation())
        })?;
        let resume = record["resume"]["step"].as_u64().zip(record["resume"]["generation"].as_u64());
        demand(resume == self.newest(), Promise::DamagedResume, || {
            format!("generation {generation} resumes from {resume:?}, the newest is {:?}", self.newest())
        })?;
        let world = record["world_size"].as_u64().unwrap_or_default();
        let members = record["roster"].as_array().into_iter().flatten();
        let roster: Vec<String> = members.map(|it| it["node"].as_str().unwrap_or_default().to_owned()).collect();
        let nodes: BTreeSet<String> = roster.iter().cloned().collect();
        demand(roster.first().is_some_and(|leader| leader == node), Promise::DoubleCommit, || {
            wrong("a generation that its leader has not formed").how
        })?;
        let fits = match writers {
            Writers::One(ranks) => world == u64::from(ranks) && nodes.len() == 1,
            Writers::Group(most) => world == nodes.len() as u64 && nodes.len() <= most as usize,
        };
        demand(fits && nodes.len() == roster.len(), Promise::Other, || wrong("a roster of other nodes or ranks").how)?;
        if let Some(old) = nodes.intersection(&self.left_out).next() {
            return Err(wrong(&format!("{old} was left out and comes back under that name")));
        }
        // Who comes and goes is said, and true.
        if let Some(continued) = record["continues"].as_u64() {
            // A follower may not have read yet that its leader has recorded an interruption; that is no harm.
            let ended = self.completed.is_some();
            demand(continued + 1 == generation && !ended, Promise::Other, || wrong("continues another").how)?;
            let before: BTreeSet<String> = self.roster().iter().cloned().collect();
            let named = |list: &Value, name: fn(&Value) -> &Value| -> BTreeSet<String> {
                let all = list.as_array().into_iter().flatten();
                all.map(|it| name(it).as_str().unwrap_or_default().to_owned()).collect()
            };
            let gone = named(&record["gone"], |it| &it["node"]);
            demand(gone == &before - &nodes, Promise::Other, || wrong("is wrong about who is gone").how)?;
            let joined = named(&record["joined"], |it| it);
            demand(joined == &nodes - &before, Promise::Other, || wrong("is wrong about who has joined").how)?;
            self.left_out.extend(gone);
        }
        self.formed.push(Formed { generation, resume, roster, world });
        Ok(())
    }

    fn apply(&mut self, number: u64, bytes: &[u8], writers: Writers) -> Checked {
        let other = |how: String| Violation { promise: Promise::Other, how: format!("journal record {number}: {how}") };
        let entry: Value = serde_json::from_slice(bytes).map_err(|error| other(error.to_string()))?;
        let record = &entry["record"];
        let (kind, node) = (record["kind"].as_str().unwrap_or_default(), entry["node"].as_str().unwrap_or_default());
        let uint = |name: &str| record[name].as_u64().ok_or_else(|| other(format!("no {name} in {record}")));
        demand((number == 0) == (kind == "created"), Promise::Other, || other(format!("is {record}")).how)?;
        match kind {
            "created" => return Ok(()),
            "formed" => {
                return self
                    .form(node, record, writers)
                    .map_err(|found| Violation { how: format!("journal record {number}: {}", found.how), ..found });
            }
            _ => {}
        }
        // Any member commits; all other records come from the leader of the newest generation.
        let may = match kind {
            "committed" => self.roster().iter().any(|member| member == node),
            _ => self.roster().first().is_some_and(|leader| leader == node),
        };
        demand(may, Promise::DoubleCommit, || {
            format!(
                "journal record {number} is of node {node}, the newest generation is of {:?}: {record}",
                self.roster()
            )
        })?;
        let keeps_house = matches!(kind, "damaged" | "pruned" | "pruned_many");
        if !keeps_house {
            let (generation, newest) = (uint("generation")?, self.generation());
            demand(generation == newest, Promise::DoubleCommit, || {
                format!("journal record {number} speaks for generation {generation}, the newest is {newest}: {record}")
            })?;
        }
        demand(keeps_house || self.completed.is_none(), Promise::DoubleCommit, || {
            format!("journal record {number} follows the end of the run: {record}")
        })?;
        match kind {
            "committed" => {
                let place = (uint("step")?, uint("generation")?);
                demand(place.0 > self.newest_step(), Promise::DoubleCommit, || {
                    format!("journal record {number} commits {place:?} after {:?}", self.newest())
                })?;
                let text = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
                self.standing.insert(place, (text("manifest"), text("manifest_crc64")));
                self.committed.push(place);
            }
            "pruned" => self.prune(number, (uint("step")?, uint("generation")?))?,
            "pruned_many" => {
                for point in record["checkpoints"].as_array().into_iter().flatten() {
                    let place = point["step"].as_u64().zip(point["generation"].as_u64());
                    self.prune(number, place.ok_or_else(|| other(format!("is {record}")))?)?;
                }
            }
            // These tests never damage stored objects.
            "damaged" => {
                return demand(false, Promise::LostCheckpoint, || format!("a checkpoint was given up: {record}"));
            }
            "interrupted" => {
                let (step, lost) = (uint("step")?, uint("lost_steps")?);
                demand(step == self.newest_step() + lost, Promise::LostCheckpoint, || {
                    other(format!("does not add up, the newest checkpoint is {:?}: {record}", self.newest())).how
                })?;
                self.interrupted.push((uint("generation")?, step, lost));
            }
            "completed" => {
                let step = uint("step")?;
                demand(step == self.newest_step(), Promise::LostCheckpoint, || {
                    other(format!("the newest checkpoint is {:?}: {record}", self.newest())).how
                })?;
                self.completed = Some(step);
            }
            "failed" => self.failed = record["reason"].as_str().map(str::to_owned),
            "notice" => {}
            _ => return Err(other(format!("of unknown kind: {record}"))),
        }
        Ok(())
    }
}

/// Every byte of a checkpoint against its manifest, the manifest against the journal.
fn whole_checkpoint(lab: &Lab, run: &str, view: &View, (step, generation): Place) -> Checked<State> {
    let lost = |how: String| Violation {
        promise: Promise::LostCheckpoint,
        how: format!("checkpoint of step {step}, generation {generation}: {how}"),
    };
    let read = |key: &str| stored(lab, run, key).ok_or_else(|| lost(format!("{key} is gone")));
    let folder = format!("checkpoints/s{step:08}-g{generation:04}");
    let (key, crc) = &view.standing[&(step, generation)];
    if *key != format!("{folder}/manifest.json") {
        return Err(lost(format!("its manifest is said to be {key}")));
    }
    let bytes = read(key)?;
    let found = crc64(&bytes);
    if found != *crc {
        return Err(lost(format!("the journal says that its manifest's checksum is {crc}, it is {found}")));
    }
    let manifest: Value = serde_json::from_slice(&bytes).map_err(|error| lost(error.to_string()))?;
    if (manifest["step"].as_u64(), manifest["generation"].as_u64()) != (Some(step), Some(generation)) {
        return Err(lost(format!("its manifest is another's: {manifest}")));
    }
    let mut state = State::new();
    for file in manifest["files"].as_array().into_iter().flatten() {
        let name = file["name"].as_str().unwrap_or_default();
        let body = read(&format!("{folder}/{name}"))?;
        let found = (body.len() as u64, crc64(&body));
        let said = (file["bytes"].as_u64().unwrap_or(u64::MAX), file["crc64"].as_str().unwrap_or_default());
        if (found.0, found.1.as_str()) != said {
            return Err(lost(format!("{name} is said to be {said:?}, it is {found:?}")));
        }
        state.push((name.to_owned(), found.0, found.1));
    }
    // The layout that a restore expects, whatever the manifest says about itself.
    for part in ["model-", "optimizer-", "trainer_state.json"] {
        if !state.iter().any(|(name, ..)| name.starts_with(part)) {
            return Err(lost(format!("its manifest names no {part}")));
        }
    }
    // Each node of its generation has put one.
    let nodes =
        view.formed.iter().find(|formed| formed.generation == generation).map_or(1, |formed| formed.roster.len());
    let receipts = lab.keys(run, &format!("{folder}/receipt-")).len();
    if receipts < nodes {
        return Err(lost(format!("{receipts} receipts of {nodes} nodes")));
    }
    Ok(state)
}

/// An object of a run; `None`: there is none.
fn stored(lab: &Lab, run: &str, key: &str) -> Option<Vec<u8>> {
    match &lab.store {
        Store::S3(server, _) => server.read(&format!("runs/{run}/{key}")).map(|bytes| bytes.to_vec()),
        Store::File(path) => std::fs::read(path.join(run).join(key)).ok(),
        Store::Moto(_) => panic!("reached by commands alone"),
    }
}

/// CRC-64/NVME, 16 hex digits: reflected, polynomial 0xad93d23594c93659, all ones before and after (NVM Express base
/// specification).
pub fn crc64(bytes: &[u8]) -> String {
    const TABLE: [u64; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut value = index as u64;
            let mut bit = 0;
            while bit < 8 {
                value = (value >> 1) ^ (0x9a6c_9329_ac4b_c9b5 * (value & 1));
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    let step = |crc: u64, byte: &u8| (crc >> 8) ^ TABLE[usize::from((crc as u8) ^ byte)];
    format!("{:016x}", !bytes.iter().fold(u64::MAX, step))
}
