//! Packs whole documents into rows of one length, best fit: a document goes to the row with the least room that still
//! takes it (Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM J.
//! Comput. 3(4), 1974).
//!
//! Rows depend on the documents and their order alone. A bounded number of rows is open at a time; if a document fits
//! in none of them, the fullest is given out. What remains of a row is filled with the end token: a document of its
//! own, without targets.

use std::collections::{BTreeMap, VecDeque};

/// Tokens of all open rows, about: bounds the memory.
const OPEN_TOKENS: usize = 4 << 20;
/// The most rows that are open at a time.
const OPEN_ROWS: usize = 1024;

/// A token and its marks: whether a document starts with it, whether it is a target, and the number of its source.
pub(super) type Marked = (u32, bool, bool, u8);

/// Rows in the making, for one split.
#[derive(Debug)]
pub(super) struct Packer {
    /// Tokens of a row.
    length: usize,
    eos_id: u32,
    most: usize,
    /// The open rows by their room, those of one room in the order in which they came to it.
    open: BTreeMap<usize, VecDeque<Vec<Marked>>>,
    rows: usize,
}

impl Packer {
    /// Rows of `length` tokens, at least 2.
    pub(super) fn new(length: usize, eos_id: u32) -> Self {
        let most = (OPEN_TOKENS / length.max(1)).clamp(1, OPEN_ROWS);
        Self { length, eos_id, most, open: BTreeMap::new(), rows: 0 }
    }

    /// Adds a document of at most a row's length, and returns the rows that are done with.
    pub(super) fn add(&mut self, document: impl ExactSizeIterator<Item = Marked>) -> Vec<Vec<Marked>> {
        let mut done = Vec::new();
        let wanted = document.len();
        let room = self.open.range(wanted..).next().map(|(room, _)| *room);
        let mut row = room.and_then(|room| self.take(room)).unwrap_or_default();
        if row.is_empty() && self.rows >= self.most {
            let fullest = self.open.keys().next().copied();
            done.extend(fullest.and_then(|room| self.take(room)).map(|row| self.filled(row)));
        }
        row.extend(document);
        match self.length.saturating_sub(row.len()) {
            0 => done.push(row),
            room => {
                self.open.entry(room).or_default().push_back(row);
                self.rows += 1;
            }
        }
        done
    }

    /// The rows that are still open.
    pub(super) fn finish(&mut self) -> Vec<Vec<Marked>> {
        let mut done = Vec::new();
        while let Some(room) = self.open.keys().next().copied() {
            done.extend(self.take(room).map(|row| self.filled(row)));
        }
        done
    }

    /// Takes out the oldest row with this room.
    fn take(&mut self, room: usize) -> Option<Vec<Marked>> {
        let rows = self.open.get_mut(&room)?;
        let row = rows.pop_front();
        if rows.is_empty() {
            self.open.remove(&room);
        }
        self.rows -= usize::from(row.is_some());
        row
    }

    fn filled(&self, mut row: Vec<Marked>) -> Vec<Marked> {
        let first = row.len();
        row.extend((first..self.length).map(|at| (self.eos_id, at == first, false, 0)));
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(id: u32, length: usize) -> Vec<Marked> {
        (0..length).map(|at| (id, at == 0, at > 0, 0)).collect()
    }

    fn packed(length: usize, documents: &[usize], most: Option<usize>) -> Vec<Vec<Marked>> {
        let mut packer = Packer::new(length, 0);
        packer.most = most.unwrap_or(packer.most);
        let mut rows = Vec::new();
        for (number, &tokens) in documents.iter().enumerate() {
            rows.extend(packer.add(document(number as u32 + 1, tokens).into_iter()));
            assert!(packer.rows <= packer.most);
        }
        rows.extend(packer.finish());
        rows
    }

    fn ids(rows: &[Vec<Marked>]) -> Vec<Vec<u32>> {
        let mut ids: Vec<Vec<u32>> = rows.iter().map(|row| row.iter().map(|token| token.0).collect()).collect();
        ids.sort();
        ids
    }

    #[test]
    fn a_document_goes_where_it_leaves_the_least_room() {
        // The fourth, of 2, fits in two rows: it goes to the one with 2 left.
        let rows = packed(8, &[4, 6, 4, 2, 8], None);
        let expected: [&[u32]; 3] = [&[1, 1, 1, 1, 3, 3, 3, 3], &[2, 2, 2, 2, 2, 2, 4, 4], &[5; 8]];
        assert_eq!(ids(&rows), expected);
    }

    #[test]
    fn the_rest_of_a_row_is_a_document_without_targets() {
        let rows = packed(6, &[4], None);
        let mut expected = document(1, 4);
        expected.extend([(0, true, false, 0), (0, false, false, 0)]);
        assert_eq!(rows, [expected]);
    }

    #[test]
    fn every_document_is_in_one_row_whole_and_the_same_order_gives_the_same_rows() {
        let mut state = 7_u64;
        let lengths: Vec<usize> = (0..3000)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                1 + (state >> 33) as usize % 40
            })
            .collect();
        for most in [1, 3, 64] {
            let rows = packed(40, &lengths, Some(most));
            assert_eq!(rows, packed(40, &lengths, Some(most)));
            let mut seen: Vec<u32> = Vec::new();
            for row in &rows {
                assert_eq!(row.len(), 40);
                let starts: Vec<usize> = (0..40).filter(|&at| row[at].1).chain([40]).collect();
                assert_eq!(starts[0], 0);
                for pair in starts.windows(2) {
                    let part = &row[pair[0]..pair[1]];
                    let id = part[0].0;
                    assert!(part.iter().all(|token| token.0 == id));
                    if id == 0 {
                        assert!(part.iter().all(|token| !token.2), "filler has no targets");
                    } else {
                        assert_eq!(part.len(), lengths[id as usize - 1]);
                        seen.push(id);
                    }
                }
            }
            seen.sort_unstable();
            assert!(seen.into_iter().eq(1..=3000));
            let tokens: usize = lengths.iter().sum();
            if most == 64 {
                assert!(rows.len() * 40 < tokens + tokens / 50, "{} rows for {tokens} tokens", rows.len());
            }
        }
    }
}
