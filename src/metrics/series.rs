//! Rows in memory, by column, and what they say of a run.

use std::collections::BTreeMap;

use crate::ids::{Generation, Step};

/// The figure that a step's own row has; rows without it say more of a state that another row has.
pub const LOSS: &str = "loss";

/// The figures of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The step.
    pub step: Step,
    /// The generation that did it.
    pub generation: Generation,
    /// When it was reported: milliseconds since 1970, UTC.
    pub at_ms: i64,
    /// The figures, by name.
    pub figures: BTreeMap<String, f64>,
}

/// Rows, column by column.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    pub(super) steps: Vec<u64>,
    pub(super) generations: Vec<u64>,
    pub(super) at_ms: Vec<i64>,
    /// Each as long as `steps`; NaN where a row has no such figure.
    pub(super) columns: BTreeMap<String, Vec<f64>>,
}

impl Series {
    /// The number of rows.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The names of all figures, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.keys().map(String::as_str)
    }

    /// One figure of every row, NaN where a row has none; `None` if no row has it.
    pub fn column(&self, name: &str) -> Option<&[f64]> {
        self.columns.get(name).map(Vec::as_slice)
    }

    /// The step, the generation and the time of every row, in their order: milliseconds since 1970, UTC.
    pub fn places(&self) -> impl Iterator<Item = (Step, Generation, i64)> + '_ {
        let names = self.steps.iter().zip(&self.generations).zip(&self.at_ms);
        names.map(|((step, generation), at_ms)| (Step(*step), Generation(*generation), *at_ms))
    }

    /// A row, by its place.
    pub fn row(&self, index: usize) -> Option<Row> {
        let figures = self.columns.iter().filter_map(|(name, values)| {
            let value = values.get(index).copied().filter(|value| !value.is_nan())?;
            Some((name.clone(), value))
        });
        Some(Row {
            step: Step(*self.steps.get(index)?),
            generation: Generation(*self.generations.get(index)?),
            at_ms: *self.at_ms.get(index)?,
            figures: figures.collect(),
        })
    }

    /// All rows, in their order.
    pub fn rows(&self) -> impl Iterator<Item = Row> {
        (0..self.len()).filter_map(|index| self.row(index))
    }

    /// Adds a row. A figure that is not a number is not kept.
    pub fn push(&mut self, row: &Row) {
        let before = self.len();
        self.steps.push(row.step.get());
        self.generations.push(row.generation.get());
        self.at_ms.push(row.at_ms);
        for (name, value) in &row.figures {
            if !self.columns.contains_key(name) {
                self.columns.insert(name.clone(), vec![f64::NAN; before]);
            }
            if let Some(column) = self.columns.get_mut(name) {
                column.push(*value);
            }
        }
        for column in self.columns.values_mut() {
            column.resize(before + 1, f64::NAN);
        }
    }

    /// Adds all rows of another.
    pub fn append(&mut self, mut other: Self) {
        let (before, after) = (self.len(), self.len() + other.len());
        self.steps.append(&mut other.steps);
        self.generations.append(&mut other.generations);
        self.at_ms.append(&mut other.at_ms);
        for (name, mut values) in other.columns {
            let column = self.columns.entry(name).or_insert_with(|| vec![f64::NAN; before]);
            column.append(&mut values);
        }
        for column in self.columns.values_mut() {
            column.resize(after, f64::NAN);
        }
    }

    /// Divides the rows into those of steps up to `last`, which are taken out, and the others, which stay.
    pub fn take_until(&mut self, last: Step) -> Self {
        let (taken, kept): (Vec<usize>, Vec<usize>) = (0..self.len()).partition(|&row| self.steps[row] <= last.get());
        let out = self.select(&taken);
        *self = self.select(&kept);
        out
    }

    fn select(&self, rows: &[usize]) -> Self {
        fn of<T: Copy>(values: &[T], rows: &[usize]) -> Vec<T> {
            rows.iter().map(|&row| values[row]).collect()
        }
        let columns = self.columns.iter().map(|(name, values)| (name.clone(), of(values, rows)));
        Self {
            steps: of(&self.steps, rows),
            generations: of(&self.generations, rows),
            at_ms: of(&self.at_ms, rows),
            columns: columns.filter(|(_, values)| values.iter().any(|value| !value.is_nan())).collect(),
        }
    }

    /// The run's one curve: each step once, in order, as the last generation that did it reports it.
    ///
    /// A generation begins after the checkpoint that it resumes from. What earlier generations had done from there on
    /// is void, even steps that the new one has not reached. Rows without a loss, the held-out loss of a state that was
    /// loaded for example, belong to the step that they name and begin nothing.
    pub fn curve(&self) -> Self {
        let loss = self.column(LOSS);
        let mut first: BTreeMap<u64, u64> = BTreeMap::new();
        for row in (0..self.len()).filter(|&row| loss.is_some_and(|loss| !loss[row].is_nan())) {
            let step = self.steps[row];
            first.entry(self.generations[row]).and_modify(|first| *first = step.min(*first)).or_insert(step);
        }
        // From this step on, the rows of a generation are void.
        let mut void: BTreeMap<u64, u64> = BTreeMap::new();
        let mut limit = u64::MAX;
        for (&generation, &first) in first.iter().rev() {
            void.insert(generation, limit);
            limit = limit.min(first);
        }
        let stands = |row: &usize| {
            let later = void.range(self.generations[*row]..).next();
            // A generation that has only measured is as void as the one before it.
            let limit = match later {
                Some((&generation, &limit)) if generation == self.generations[*row] => limit,
                Some((generation, _)) => first.range(*generation..).map(|(_, first)| *first).min().unwrap_or(u64::MAX),
                None => u64::MAX,
            };
            self.steps[*row] < limit
        };
        let mut rows: Vec<usize> = (0..self.len()).filter(stands).collect();
        rows.sort_by_key(|&row| (self.steps[row], self.generations[row], self.at_ms[row]));
        let mut curve = self.select(&rows);
        curve.unite(|curve, a, b| curve.steps[a] == curve.steps[b]);
        curve
    }

    /// The same set of rows, each step of each generation once.
    pub(super) fn without_repeats(&self) -> Self {
        let mut rows: Vec<usize> = (0..self.len()).collect();
        rows.sort_by_key(|&row| (self.generations[row], self.steps[row], self.at_ms[row]));
        let mut set = self.select(&rows);
        set.unite(|set, a, b| (set.generations[a], set.steps[a]) == (set.generations[b], set.steps[b]));
        set
    }

    /// Makes one row of all that are `same` and stand side by side: figures of later ones count.
    fn unite(&mut self, same: impl Fn(&Self, usize, usize) -> bool) {
        let mut kept: Vec<usize> = Vec::with_capacity(self.len());
        for row in 0..self.len() {
            match kept.last() {
                Some(&before) if same(self, before, row) => {
                    let own = self.columns.get(LOSS).is_none_or(|loss| !loss[row].is_nan());
                    for column in self.columns.values_mut() {
                        if !column[row].is_nan() {
                            column[before] = column[row];
                        }
                    }
                    if own {
                        (self.generations[before], self.at_ms[before]) = (self.generations[row], self.at_ms[row]);
                    }
                }
                _ => kept.push(row),
            }
        }
        if kept.len() < self.len() {
            *self = self.select(&kept);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A row whose loss names its generation and step.
    pub(in crate::metrics) fn row(generation: u64, step: u64) -> Row {
        let loss = generation as f64 + step as f64 / 1e6;
        let figures = [(LOSS.to_owned(), loss), ("lr".to_owned(), 1e-3)].into();
        Row { step: Step(step), generation: Generation(generation), at_ms: step as i64 * 1000, figures }
    }

    pub(in crate::metrics) fn series(rows: impl IntoIterator<Item = Row>) -> Series {
        let mut series = Series::default();
        rows.into_iter().for_each(|row| series.push(&row));
        series
    }

    fn curve(series: &Series) -> Vec<(u64, u64)> {
        series.curve().rows().map(|row| (row.step.get(), row.generation.get())).collect()
    }

    #[test]
    fn steps_that_are_done_again_count_once_as_they_were_done_last() {
        let all = series((1..=10).map(|step| row(1, step)).chain((7..=12).map(|step| row(2, step))));
        let expected: Vec<_> = (1..=6).map(|step| (step, 1)).chain((7..=12).map(|step| (step, 2))).collect();
        assert_eq!(curve(&all), expected);
        assert_eq!(all.curve().column(LOSS).unwrap()[6], 2.000_007);
    }

    #[test]
    fn what_lies_beyond_a_resume_is_void_before_it_is_done_again() {
        // From the checkpoint of step 4, by hand: steps 5 to 10 of before are another run's future.
        let all = series((1..=10).map(|step| row(1, step)).chain([row(3, 5)]));
        assert_eq!(curve(&all), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 3)]);
        let all = series((1..=10).map(|step| row(1, step)).chain([row(2, 8), row(3, 5)]));
        assert_eq!(curve(&all), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 3)]);
    }

    #[test]
    fn a_later_measurement_joins_its_step_and_begins_nothing() {
        let measured = |generation, step| Row {
            figures: [("held_out_loss".to_owned(), 7.0)].into(),
            at_ms: 99_000,
            ..row(generation, step)
        };
        let all = series([row(1, 1), row(1, 2), row(1, 3), measured(1, 2), measured(2, 3)]);
        assert_eq!(curve(&all), [(1, 1), (2, 1), (3, 1)]);
        let seen = all.curve();
        assert_eq!(seen.column("held_out_loss").unwrap()[1..], [7.0, 7.0]);
        assert_eq!((seen.column(LOSS).unwrap()[2], seen.at_ms[2]), (1.000_003, 3000));
        // The measured state is void when the run goes on from before it.
        let all = series([row(1, 1), row(1, 2), measured(2, 2), row(3, 2)]);
        assert_eq!(curve(&all), [(1, 1), (2, 3)]);
        assert_eq!(all.curve().column("held_out_loss"), None);
    }

    #[test]
    fn rows_are_divided_at_a_step_and_put_together_again() {
        let mut all = series((1..=5).map(|step| row(1, step)));
        let taken = all.take_until(Step(3));
        assert_eq!((taken.len(), all.len()), (3, 2));
        let mut whole = Series::default();
        whole.append(taken);
        whole.append(all);
        whole.append(series([Row { figures: [("other".into(), 1.0)].into(), ..row(1, 6) }]));
        assert_eq!(whole.row(0), Some(row(1, 1)));
        assert_eq!(whole.row(5).unwrap().figures, [("other".into(), 1.0)].into());
        assert_eq!(whole.row(6), None);
        assert_eq!(whole.names().collect::<Vec<_>>(), ["loss", "lr", "other"]);
    }

    /// A life of a run: each generation resumes after one of the steps before it, and does some steps.
    fn life() -> impl Strategy<Value = Vec<(u64, u64)>> {
        proptest::collection::vec((0..100_u64, 1..30_u64), 1..8)
    }

    proptest! {
        /// The curve is that of a run which forgets everything beyond the step that it resumes from.
        #[test]
        fn the_curve_is_what_the_run_itself_would_remember(
            life in life(), shuffle in any::<u64>(), twice in 0..40_usize
        ) {
            let (mut rows, mut remembers): (Vec<Row>, Vec<(u64, u64)>) = (Vec::new(), Vec::new());
            for (generation, (from, count)) in (1..).zip(life) {
                remembers.truncate((from as usize).min(remembers.len()));
                for _ in 0..count {
                    let step = remembers.len() as u64 + 1;
                    remembers.push((step, generation));
                    rows.push(row(generation, step));
                }
            }
            // In any order, and some of them twice.
            rows.extend_from_within(..twice.min(rows.len()));
            rows.sort_by_key(|row| {
                let mixed = (row.step.get() ^ shuffle).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                mixed ^ row.generation.get()
            });
            let all = series(rows);
            prop_assert_eq!(curve(&all), remembers);
            // A merge is itself a set of rows: nothing changes by it.
            prop_assert_eq!(all.curve().curve(), all.curve());
            prop_assert_eq!(all.without_repeats().curve(), all.curve());
            prop_assert!(all.without_repeats().len() + twice.min(all.len()) >= all.len());
        }
    }
}
