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

use crate::support::lab::Lab;

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
    /// The node that formed the newest generation.
    holder: String,
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
}

/// Name, size and checksum of every file of a checkpoint.
type State = Vec<(String, u64, String)>;

/// The state after each step on each number of ranks, as first seen in any run.
static STATES: Mutex<BTreeMap<(u32, u64), State>> = Mutex::new(BTreeMap::new());

/// Checks one run again and again.
#[derive(Debug, Default)]
pub struct Auditor {
    journal: Vec<Vec<u8>>,
}

impl Auditor {
    /// Reads the whole store of a run on which no agent is at work.
    pub fn audit(&mut self, lab: &Lab, run: &str, ranks: u32) -> Checked<View> {
        let keys: BTreeSet<String> = lab.keys(run, "").into_iter().collect();
        let view = self.read_journal(lab, run, &keys, ranks)?;
        for &(step, generation) in view.standing.keys() {
            let state = whole_checkpoint(lab, run, &keys, &view, (step, generation))?;
            let mut states = STATES.lock().unwrap_or_else(PoisonError::into_inner);
            let first = states.entry((ranks, step)).or_insert_with(|| state.clone());
            demand(*first == state, Promise::DamagedResume, || {
                format!("step {step} of generation {generation} holds {state:?}; others had {first:?}")
            })?;
        }
        Ok(view)
    }

    fn read_journal(&mut self, lab: &Lab, run: &str, keys: &BTreeSet<String>, ranks: u32) -> Checked<View> {
        let mut numbers: Vec<u64> = keys.iter().filter_map(|key| number(key)).collect();
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
            view.apply(number, &bytes, ranks)?;
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

    fn apply(&mut self, number: u64, bytes: &[u8], ranks: u32) -> Checked {
        let other = |how: String| Violation { promise: Promise::Other, how: format!("journal record {number}: {how}") };
        let entry: Value = serde_json::from_slice(bytes).map_err(|error| other(error.to_string()))?;
        let record = &entry["record"];
        let (kind, node) = (record["kind"].as_str().unwrap_or_default(), entry["node"].as_str().unwrap_or_default());
        let uint = |name: &str| record[name].as_u64().ok_or_else(|| other(format!("no {name} in {record}")));
        demand((number == 0) == (kind == "created"), Promise::Other, || other(format!("is {record}")).how)?;
        match kind {
            "created" => return Ok(()),
            "formed" => {
                let generation = uint("generation")?;
                demand(generation == self.generation() + 1, Promise::DoubleCommit, || {
                    format!("generation {generation} follows {}", self.generation())
                })?;
                demand(uint("world_size")? == u64::from(ranks), Promise::Other, || other(format!("is {record}")).how)?;
                let resume = &record["resume"];
                let resume = resume["step"].as_u64().zip(resume["generation"].as_u64());
                demand(resume == self.newest(), Promise::DamagedResume, || {
                    format!("generation {generation} resumes from {resume:?}, the newest is {:?}", self.newest())
                })?;
                self.formed.push(Formed { generation, resume });
                node.clone_into(&mut self.holder);
                return Ok(());
            }
            _ => {}
        }
        // All other records come from the holder of the newest generation.
        demand(node == self.holder, Promise::DoubleCommit, || {
            format!("journal record {number} is of node {node}, which {} had fenced: {record}", self.holder)
        })?;
        if !matches!(kind, "damaged" | "pruned" | "pruned_many") {
            let (generation, newest) = (uint("generation")?, self.generation());
            demand(generation == newest, Promise::DoubleCommit, || {
                format!("journal record {number} speaks for generation {generation}, the newest is {newest}: {record}")
            })?;
        }
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
                self.interrupted.push((uint("generation")?, uint("step")?, uint("lost_steps")?));
            }
            "completed" => {
                demand(self.completed.is_none(), Promise::DoubleCommit, || "completed twice".into())?;
                self.completed = Some(uint("step")?);
            }
            "failed" => self.failed = record["reason"].as_str().map(str::to_owned),
            "notice" => {}
            _ => return Err(other(format!("of unknown kind: {record}"))),
        }
        Ok(())
    }
}

/// Every byte of a checkpoint against its manifest, the manifest against the journal.
fn whole_checkpoint(
    lab: &Lab,
    run: &str,
    keys: &BTreeSet<String>,
    view: &View,
    (step, generation): Place,
) -> Checked<State> {
    let lost = |how: String| Violation {
        promise: Promise::LostCheckpoint,
        how: format!("checkpoint of step {step}, generation {generation}: {how}"),
    };
    let read = |key: &str| {
        if keys.contains(key) { Ok(lab.read(run, key)) } else { Err(lost(format!("{key} is gone"))) }
    };
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
    let receipts = keys.iter().filter(|key| key.starts_with(&format!("{folder}/receipt-"))).count();
    if receipts == 0 {
        return Err(lost("it has no receipt".into()));
    }
    Ok(state)
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
