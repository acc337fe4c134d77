//! Recorded machines: files that list how many were available when.
//!
//! Two formats. JSON, as published with SkyPilot's spot traces: `{"metadata":{"gap_seconds":g},"data":[n, n, …]}`, the
//! machines available at every g seconds. CSV, as published with Bamboo: `milliseconds,add|remove,node` per line, in
//! order of time. A gang of n nodes is up while there are n. With counts, a drop below n interrupts it (its own nodes
//! are assumed to go last). With names, the loss of one of its own nodes interrupts it, and the node that has been
//! present longest takes the place. Spares are not paid for. A trace is read to its end and then once more from its
//! start: its end counts as a loss. Nothing is stored; a file is read up to [`MAX_BYTES`].

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Machines, Span};
use crate::error::{Explain, Kind};

/// The longest trace that is read, bytes.
pub const MAX_BYTES: u64 = 32 << 20;
/// The longest time between two lines of a trace and between two counts, seconds: a year.
const MAX_GAP_S: f64 = 365.0 * 86_400.0;

/// Why a trace can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It can't be read.
    #[error("read trace {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is too long.
    #[error("trace {path} is longer than {MAX_BYTES} bytes")]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// Its content is malformed.
    #[error("trace {path}: {what}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The place, and what was expected.
        what: String,
    },
}

impl Explain for TraceError {
    fn kind(&self) -> Kind {
        Kind::Config
    }
    fn hint(&self) -> Option<String> {
        let formats = "a trace is JSON, {\"metadata\":{\"gap_seconds\":60},\"data\":[1,0,…]}, or CSV, a line \
            `milliseconds,add|remove,node` \
                       for each change";
        matches!(self, Self::Wrong { .. }).then(|| formats.to_owned())
    }
}

/// When a gang was up, and for how long it was watched.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Begin and end of each, seconds since the trace's start; in order, none empty.
    up: Vec<(f64, f64)>,
    length_s: f64,
}

#[derive(Deserialize)]
struct Counts {
    metadata: Metadata,
    data: Vec<u32>,
}

#[derive(Deserialize)]
struct Metadata {
    gap_seconds: f64,
}

impl Trace {
    /// Reads a file: what `nodes` nodes would have experienced.
    pub fn read(path: &Path, nodes: u32) -> Result<Self, TraceError> {
        let read = |source| TraceError::Read { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes)).map_err(read)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(TraceError::TooLong { path: path.to_owned() });
        }
        Self::parse(&bytes, nodes).map_err(|what| TraceError::Wrong { path: path.to_owned(), what })
    }

    fn parse(bytes: &[u8], nodes: u32) -> Result<Self, String> {
        let trace = match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
            None => return Err("it is empty".into()),
            Some(b'{') => Self::of_counts(&serde_json::from_slice(bytes).map_err(|error| error.to_string())?, nodes)?,
            Some(_) => Self::of_changes(std::str::from_utf8(bytes).map_err(|error| error.to_string())?, nodes)?,
        };
        if trace.up.is_empty() {
            return Err(format!("there never were {nodes} machines at once"));
        }
        Ok(trace)
    }

    fn of_counts(counts: &Counts, nodes: u32) -> Result<Self, String> {
        let gap_s = counts.metadata.gap_seconds;
        if !(gap_s > 0.0 && gap_s <= MAX_GAP_S) {
            return Err(format!("metadata.gap_seconds is {gap_s}; expected more than 0 and at most a year"));
        }
        let mut up: Vec<(f64, f64)> = Vec::new();
        let mut before = false;
        for (index, count) in counts.data.iter().enumerate() {
            let end = (index + 1) as f64 * gap_s;
            match up.last_mut() {
                Some(last) if before && *count >= nodes => last.1 = end,
                _ if *count >= nodes => up.push((index as f64 * gap_s, end)),
                _ => {}
            }
            before = *count >= nodes;
        }
        Ok(Self { up, length_s: counts.data.len() as f64 * gap_s })
    }

    fn of_changes(text: &str, nodes: u32) -> Result<Self, String> {
        // The machines present, the oldest first: the first `nodes` are the gang.
        let mut there: Vec<&str> = Vec::new();
        let (mut up, mut up_since, mut now) = (Vec::new(), None, 0.0);
        let mut first = None;
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
            let wrong = |what: &str| format!("line {number}: {what}");
            let mut fields = line.split(',').map(str::trim);
            let (Some(time), Some(change), Some(node), None) =
                (fields.next(), fields.next(), fields.next(), fields.next())
            else {
                return Err(wrong("expected three fields, milliseconds,add|remove,node"));
            };
            let millis: u64 = time.parse().map_err(|_| wrong("expected milliseconds, a whole number from 0"))?;
            let at = millis as f64 / 1000.0;
            let begin = *first.get_or_insert(at);
            if at - begin < now || at - begin > now + MAX_GAP_S {
                return Err(wrong("its time is before that of the line above, or more than a year after it"));
            }
            now = at - begin;
            let place = there.iter().position(|known| *known == node);
            let gang = nodes as usize;
            match (change, place) {
                ("add", None) => {
                    there.push(node);
                    if there.len() == gang {
                        up_since = Some(now);
                    }
                }
                ("remove", Some(index)) => {
                    there.remove(index);
                    if let Some(since) = up_since.filter(|_| index < gang) {
                        up.push((since, now));
                        up_since = (there.len() >= gang).then_some(now);
                    }
                }
                ("add", Some(_)) => return Err(wrong("adds a node that is there already")),
                ("remove", None) => return Err(wrong("removes a node that is not there")),
                _ => return Err(wrong("expected add or remove")),
            }
        }
        up.extend(up_since.map(|since| (since, now)));
        up.retain(|(start, end)| end > start);
        Ok(Self { up, length_s: now })
    }

    /// The mean time for which the gang was up, seconds.
    pub fn mean_life_s(&self) -> f64 {
        self.up.iter().map(|(start, end)| end - start).sum::<f64>() / self.up.len() as f64
    }

    /// How often it was up.
    pub fn lives(&self) -> usize {
        self.up.len()
    }

    /// The share of time in which it was up.
    pub fn up_share(&self) -> f64 {
        self.mean_life_s() * self.up.len() as f64 / self.length_s
    }

    /// Its machines, over and over. Trial 0 of `trials` begins at its start, every other trial at another life.
    pub fn machines(&self, trial: u32, trials: u32) -> impl Machines {
        let first = (u64::from(trial) * self.up.len() as u64 / u64::from(trials.max(1))) as usize;
        let offset_s = if first == 0 { 0.0 } else { -self.up[first].0 };
        Replay { trace: self, next: first, offset_s }
    }
}

/// The position of a replay.
struct Replay<'a> {
    trace: &'a Trace,
    next: usize,
    /// Added to times of the trace.
    offset_s: f64,
}

impl Machines for Replay<'_> {
    fn next_span(&mut self) -> Option<Span> {
        let (start, end) = *self.trace.up.get(self.next)?;
        let span = Span { start_s: start + self.offset_s, end_s: end + self.offset_s, idle_node_s: 0.0 };
        self.next += 1;
        if self.next == self.trace.up.len() {
            (self.next, self.offset_s) = (0, self.offset_s + self.trace.length_s);
        }
        Some(span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::goodput::{Costs, Job, Notice, simulate};

    fn wrong(text: &str) -> String {
        Trace::parse(text.as_bytes(), 2).unwrap_err()
    }

    #[test]
    fn counts_become_times_in_which_all_nodes_are_present() {
        let text = br#"{"metadata":{"gap_seconds":10.0,"zone":"x"},"data":[1,2,3,1,0,2]}"#;
        let two = Trace::parse(text, 2).unwrap();
        assert_eq!(two, Trace { up: vec![(10.0, 30.0), (50.0, 60.0)], length_s: 60.0 });
        assert_eq!((two.lives(), two.mean_life_s(), two.up_share()), (2, 15.0, 0.5));
        assert_eq!(Trace::parse(text, 1).unwrap().up, [(0.0, 40.0), (50.0, 60.0)]);
    }

    /// a and b are the gang; c takes b's place at once. When a and c go at the same moment only d is left, until e
    /// comes.
    #[test]
    fn changes_become_the_lives_of_the_nodes_present_longest() {
        let text = "1000,add,a\n2000,add,b\n3000,add,c\n5000,remove,b\n6000,add,d\n7000,remove,a\n7000,remove,c\n\n9000,add,e\n9500,add,f\n9700,remove,f\n9900,add,g\n";
        let trace = Trace::parse(text.as_bytes(), 2).unwrap();
        assert_eq!(trace, Trace { up: vec![(1.0, 4.0), (4.0, 6.0), (8.0, 8.9)], length_s: 8.9 });
    }

    #[test]
    fn an_error_names_its_line() {
        for (text, said) in [
            (" \n", "empty"),
            ("{\"metadata\":{\"gap_seconds\":60},\n\"data\":[1,-1]}", "line 2"),
            ("{\"metadata\":{\"gap_seconds\":60},\"data\":[NaN]}", "line 1"),
            ("{\"metadata\":{\"gap_seconds\":60},\"data\":[1.5]}", "1.5"),
            ("{\"metadata\":{\"gap_seconds\":-60},\"data\":[2]}", "gap_seconds is -60"),
            ("{\"metadata\":{\"gap_seconds\":0},\"data\":[2]}", "gap_seconds is 0"),
            ("{\"metadata\":{\"gap_seconds\":1e400},\"data\":[2]}", "line 1"),
            ("{\"metadata\":{},\"data\":[2]}", "gap_seconds"),
            ("{\"metadata\":{\"gap_seconds\":60},\"data\":[]}", "never were 2"),
            ("{\"metadata\":{\"gap_seconds\":60},\"data\":[1,1]}", "never were 2"),
            ("0,add,a\n5,add", "line 2: expected three fields"),
            ("0,add,a,b", "line 1"),
            ("0,add,a\n-5,add,b", "line 2: expected milliseconds"),
            ("nan,add,a", "line 1: expected milliseconds"),
            ("5,add,a\n4,add,b", "line 2: its time"),
            ("0,add,a\n99999999999999999,add,b", "line 2: its time"),
            ("0,add,a\n5,add,a", "line 2: adds"),
            ("0,add,a\n5,remove,b", "line 2: removes"),
            ("0,replace,a", "line 1: expected add or remove"),
            ("0,add,a", "never were 2"),
        ] {
            assert!(wrong(text).contains(said), "{text:?}: {:?} does not say {said:?}", wrong(text));
        }
        assert!(Trace::parse(b"\xff\xfe", 1).unwrap_err().contains("utf-8"));
    }

    /// Up 0–100 and 150–250 of 300 s, restart 10, stall 5, durable 10, 200 s of work, a save after each 30 s of
    /// training.
    ///
    /// Life 1: training 10–40, order 40, 45–75, order 75, 80–100: 80 s trained; durable 50 and 85: 60 s kept, 20 lost.
    /// Life 2: orders at 190 and 225 (durable 235), 60 s more: 120 s kept, 80 left. Training 230–250 lost.
    /// Life 3, at 300–400: orders at 340 and 375: 180 s kept. Life 4, at 450–550: 20 s left, done at 480, committed at
    /// 490.
    #[test]
    fn a_replay_matches_one_by_hand() {
        let trace = Trace { up: vec![(0.0, 100.0), (150.0, 250.0)], length_s: 300.0 };
        let costs = Costs { stall_s: 5.0, durable_s: 10.0, restart_s: 10.0 };
        let job = Job { work_s: 200.0, nodes: 1, costs, notice: Notice::NONE };
        let found = simulate(&job, |_| 30.0, |trial| trace.machines(trial, 1), 1, 0).unwrap();
        assert_eq!((found.wall_s, found.paid_node_s, found.interruptions, found.lost_s), (490.0, 340.0, 3.0, 60.0));
        assert_eq!((found.goodput, found.goodput_error), (200.0 / 340.0, 0.0));
        // Warned 10 s ahead, life 1 stops at 90 with 70 s, life 2 too, life 3 has 60 left: trained 310–340, 345–375,
        // committed 385.
        let warned = Job { notice: Notice { share: 1.0, lead_s: 10.0 }, ..job };
        let found = simulate(&warned, |_| 30.0, |trial| trace.machines(trial, 1), 1, 0).unwrap();
        assert_eq!((found.wall_s, found.interruptions, found.lost_s), (385.0, 2.0, 0.0));
    }

    #[test]
    fn a_missing_or_too_long_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        assert!(Trace::read(&path, 1).unwrap_err().to_string().contains("trace.json"));
        File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        assert!(matches!(Trace::read(&path, 1), Err(TraceError::TooLong { .. })));
    }
}
