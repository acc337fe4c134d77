//! Packed records, for [`super::summary`]: the two kinds that a long run writes by the hundred thousand are columns of
//! numbers, all others are the very bytes in the store. Pure.
//!
//! Stored layout: a *block* is `length of the rest (u32), CRC64 of the rest (u64), rows`, a *row* is `CRC64 of the
//! record's bytes (u64), tag`, and a content by the tag: 0 the bytes themselves, 1 a `committed` with a loss and no
//! metrics, 2 a `pruned` of one checkpoint. Numbers with a fixed width are little-endian; the others are LEB128, signed
//! ones zigzag. Times, steps, generations and sizes are differences to the row before. A block is self-contained.
//!
//! Invariant: the result of [`pack`] has been unpacked again and equals, row for row, the stored bytes: a record that
//! this program would spell differently, or that has a field it does not know, is kept as it is. Only the attempt id of
//! a row with tag 1 or 2 is left out; nothing needs it once a record is read.

use bytes::Bytes;
use jiff::Timestamp;

use super::record::{Committed, Entry, InvalidEntry, Metrics, Record, SaveCost};
use crate::{
    ids::{AttemptId, Generation, NodeId, Step},
    layout,
    storage::Crc64,
};

const VERBATIM: u8 = 0;
const COMMITTED: u8 = 1;
const PRUNED: u8 = 2;
/// The length and the checksum before the rows.
const HEAD: usize = 12;

/// One packed record.
#[derive(Debug)]
pub(super) struct Row {
    /// The checksum of the bytes in the store.
    pub crc64: Crc64,
    pub entry: Entry,
}

/// Why a block can't be read.
#[derive(Debug)]
pub(super) enum Unreadable {
    /// A record in it has a newer format.
    Newer,
    /// It is damaged; the text says how.
    Garbled(&'static str),
}

/// The base of the differences.
#[derive(Default)]
struct Before {
    at: i128,
    node: Option<NodeId>,
    step: u64,
    generation: u64,
    bytes: u64,
}

/// The attempt of a row that has none.
fn no_attempt() -> Result<AttemptId, Unreadable> {
    AttemptId::new("summary").map_err(|_| Unreadable::Garbled("no attempt"))
}

/// A block of these records; `None` if it does not read back as the input.
pub(super) fn pack<'a>(records: impl Iterator<Item = (&'a Entry, &'a Bytes)> + Clone) -> Option<Bytes> {
    let mut rows = Vec::new();
    let mut before = Before::default();
    for (entry, body) in records.clone() {
        rows.extend(Crc64::of(body).0.to_le_bytes());
        let plain = serde_json::to_vec(entry).is_ok_and(|again| again == *body);
        match &entry.record {
            Record::Committed(committed @ Committed { loss: Some(loss), .. })
                if plain && committed.metrics.is_empty() =>
            {
                rows.push(COMMITTED);
                put_common(&mut rows, &mut before, entry, committed.step, committed.generation);
                put_committed(&mut rows, &mut before, committed, *loss);
            }
            Record::Pruned { step, generation } if plain => {
                rows.push(PRUNED);
                put_common(&mut rows, &mut before, entry, *step, *generation);
            }
            _ => {
                rows.push(VERBATIM);
                put_bytes(&mut rows, body);
                before.at = entry.at.as_nanosecond();
                before.node = Some(entry.node.clone());
            }
        }
    }
    let mut block = u32::try_from(rows.len()).ok()?.to_le_bytes().to_vec();
    block.extend(Crc64::of(&rows).0.to_le_bytes());
    block.append(&mut rows);
    let mut read = unpack(&block).ok()?.into_iter();
    for (entry, _) in records {
        let again = Entry { attempt: entry.attempt.clone(), ..read.next()?.entry };
        // As text, because a float that is not a number equals nothing.
        if serde_json::to_vec(&again).ok()? != serde_json::to_vec(entry).ok()? {
            return None;
        }
    }
    read.next().is_none().then(|| block.into())
}

fn put_common(rows: &mut Vec<u8>, before: &mut Before, entry: &Entry, step: Step, generation: Generation) {
    let at = entry.at.as_nanosecond();
    put_signed(rows, at - before.at);
    before.at = at;
    if before.node.as_ref() == Some(&entry.node) {
        put(rows, 0);
    } else {
        put_bytes(rows, entry.node.as_str().as_bytes());
        before.node = Some(entry.node.clone());
    }
    put_difference(rows, &mut before.step, step.get());
    put_difference(rows, &mut before.generation, generation.get());
}

fn put_committed(rows: &mut Vec<u8>, before: &mut Before, committed: &Committed, loss: f64) {
    let Committed { step, generation, manifest, manifest_crc64, bytes, loss: _, validation_loss, metrics: _, cost } =
        committed;
    let SaveCost { stall_s, copy_s, durable_s, lived_s } = cost;
    let usual = *manifest == usual_manifest(*step, *generation);
    let lived_s = Some(*lived_s).filter(|lived| lived.to_bits() != 0);
    let sum = manifest_crc64.parse::<Crc64>().ok().filter(|sum| sum.to_string() == *manifest_crc64);
    rows.push(
        u8::from(!usual)
            | u8::from(sum.is_none()) << 1
            | u8::from(validation_loss.is_some()) << 2
            | u8::from(lived_s.is_some()) << 3,
    );
    if !usual {
        put_bytes(rows, manifest.as_bytes());
    }
    match sum {
        Some(sum) => rows.extend(sum.0.to_le_bytes()),
        None => put_bytes(rows, manifest_crc64.as_bytes()),
    }
    put_difference(rows, &mut before.bytes, *bytes);
    let values = [Some(loss), *validation_loss, Some(*stall_s), Some(*copy_s), Some(*durable_s), lived_s];
    for value in values.into_iter().flatten() {
        rows.extend(value.to_bits().to_le_bytes());
    }
}

fn usual_manifest(step: Step, generation: Generation) -> String {
    format!("{}/{}", layout::checkpoint(step, generation), layout::MANIFEST)
}

fn put(rows: &mut Vec<u8>, mut value: u128) {
    while value >= 0x80 {
        rows.push(value as u8 | 0x80);
        value >>= 7;
    }
    rows.push(value as u8);
}

fn put_signed(rows: &mut Vec<u8>, value: i128) {
    put(rows, (value << 1 ^ value >> 127) as u128);
}

fn put_difference(rows: &mut Vec<u8>, before: &mut u64, value: u64) {
    put_signed(rows, i128::from(value) - i128::from(*before));
    *before = value;
}

fn put_bytes(rows: &mut Vec<u8>, bytes: &[u8]) {
    put(rows, bytes.len() as u128);
    rows.extend(bytes);
}

/// The first block of `bytes`, and what follows it.
pub(super) fn cut(bytes: &Bytes) -> Option<(Bytes, Bytes)> {
    let length = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?);
    let end = HEAD.checked_add(length as usize)?;
    (end <= bytes.len()).then(|| (bytes.slice(..end), bytes.slice(end..)))
}

/// The records of a block.
pub(super) fn unpack(block: &[u8]) -> Result<Vec<Row>, Unreadable> {
    let mut head = Reader(block);
    let (length, sum) = (u32::from_le_bytes(head.array()?), Crc64(u64::from_le_bytes(head.array()?)));
    let rows = head.take(length as usize)?;
    if !head.0.is_empty() {
        return Err(Unreadable::Garbled("a block's length is not the recorded one"));
    }
    if Crc64::of(rows) != sum {
        return Err(Unreadable::Garbled("a block's checksum is not the recorded one"));
    }
    let (mut rows, mut before, mut found) = (Reader(rows), Before::default(), Vec::new());
    let attempt = no_attempt()?;
    while !rows.0.is_empty() {
        let crc64 = Crc64(u64::from_le_bytes(rows.array()?));
        let [tag] = rows.array()?;
        if tag == VERBATIM {
            let body = rows.bytes()?;
            if Crc64::of(body) != crc64 {
                return Err(Unreadable::Garbled("a record's checksum is not the recorded one"));
            }
            let entry = Entry::decode(body).map_err(|error| match error {
                InvalidEntry::Newer { .. } => Unreadable::Newer,
                InvalidEntry::Garbled(_) => Unreadable::Garbled("a record in it is malformed"),
            })?;
            before.at = entry.at.as_nanosecond();
            before.node = Some(entry.node.clone());
            found.push(Row { crc64, entry });
            continue;
        }
        before.at = before.at.checked_add(rows.signed()?).ok_or(Unreadable::Garbled("a time is out of range"))?;
        let at = Timestamp::from_nanosecond(before.at).map_err(|_| Unreadable::Garbled("a time is out of range"))?;
        let node = rows.text()?;
        if !node.is_empty() {
            before.node = Some(NodeId::new(node).map_err(|_| Unreadable::Garbled("a node id is malformed"))?);
        }
        let node = before.node.clone().ok_or(Unreadable::Garbled("a record has no node"))?;
        let step = Step(rows.difference(&mut before.step)?);
        let generation = Generation(rows.difference(&mut before.generation)?);
        let record = match tag {
            COMMITTED => Record::Committed(rows.committed(&mut before, step, generation)?),
            PRUNED => Record::Pruned { step, generation },
            _ => return Err(Unreadable::Garbled("a record is of no known kind")),
        };
        found.push(Row { crc64, entry: Entry { format: record.format(), attempt: attempt.clone(), at, node, record } });
    }
    Ok(found)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Unreadable> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Unreadable::Garbled("it ends too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Unreadable> {
        self.take(N)?.try_into().map_err(|_| Unreadable::Garbled("it ends too early"))
    }

    fn number(&mut self) -> Result<u128, Unreadable> {
        let mut value = 0;
        for shift in (0..126).step_by(7) {
            let [byte] = self.array()?;
            value |= u128::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Unreadable::Garbled("a number is too long"))
    }

    fn signed(&mut self) -> Result<i128, Unreadable> {
        let value = self.number()?;
        Ok((value >> 1) as i128 ^ -((value & 1) as i128))
    }

    fn difference(&mut self, before: &mut u64) -> Result<u64, Unreadable> {
        let value = i128::from(*before).checked_add(self.signed()?).and_then(|value| u64::try_from(value).ok());
        *before = value.ok_or(Unreadable::Garbled("a number is out of range"))?;
        Ok(*before)
    }

    fn bytes(&mut self) -> Result<&'a [u8], Unreadable> {
        let length = usize::try_from(self.number()?).map_err(|_| Unreadable::Garbled("it ends too early"))?;
        self.take(length)
    }

    fn text(&mut self) -> Result<&'a str, Unreadable> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Unreadable::Garbled("a text is malformed"))
    }

    fn float(&mut self) -> Result<f64, Unreadable> {
        Ok(f64::from_bits(u64::from_le_bytes(self.array()?)))
    }

    fn committed(&mut self, before: &mut Before, step: Step, generation: Generation) -> Result<Committed, Unreadable> {
        let [flags] = self.array()?;
        let manifest = if flags & 1 == 0 { usual_manifest(step, generation) } else { self.text()?.to_owned() };
        let manifest_crc64 = match flags & 2 {
            0 => Crc64(u64::from_le_bytes(self.array()?)).to_string(),
            _ => self.text()?.to_owned(),
        };
        let bytes = self.difference(&mut before.bytes)?;
        let (loss, metrics) = (Some(self.float()?), Metrics::new());
        let validation_loss = if flags & 4 == 0 { None } else { Some(self.float()?) };
        let (stall_s, copy_s, durable_s) = (self.float()?, self.float()?, self.float()?);
        let lived_s = if flags & 8 == 0 { 0.0 } else { self.float()? };
        let cost = SaveCost { stall_s, copy_s, durable_s, lived_s };
        Ok(Committed { step, generation, manifest, manifest_crc64, bytes, loss, validation_loss, metrics, cost })
    }
}
