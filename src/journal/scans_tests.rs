//! The state compared with the plain scans that came before its index, on random journals.

use proptest::prelude::*;

use super::{testing::*, *};
use crate::ids::{Generation, Step};

type Point = (u64, u64);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Status {
    Good,
    Damaged,
    Pruned,
}

/// What the state did before it had an index: it scanned everything for every question.
#[derive(Default)]
struct Scans {
    formations: Vec<(u64, Option<Point>)>,
    checkpoints: Vec<(Point, Status)>,
    ended: bool,
}

impl Scans {
    fn generation(&self) -> u64 {
        self.formations.last().map_or(0, |formation| formation.0)
    }

    fn status(&self, point: Point) -> Option<Status> {
        self.checkpoints.iter().rev().find(|c| c.0 == point).map(|c| c.1)
    }

    fn candidates(&self) -> Vec<Point> {
        let mut found = Vec::new();
        let mut limit = None;
        let mut formation = self.formations.last();
        while let Some((generation, resume)) = formation {
            let within = |c: &&(Point, Status)| c.0.1 == *generation && limit.is_none_or(|limit| c.0.0 <= limit);
            let mut own: Vec<_> = self.checkpoints.iter().filter(within).collect();
            own.sort_by_key(|c| std::cmp::Reverse(c.0.0));
            found.extend(own.into_iter().filter(|c| c.1 == Status::Good).map(|c| c.0));
            formation = resume.as_ref().and_then(|point| {
                limit = Some(point.0);
                self.formations.iter().find(|f| f.0 == point.1 && f.0 < *generation)
            });
        }
        found
    }

    fn good(&self) -> Vec<Point> {
        self.checkpoints.iter().rev().filter(|c| c.1 == Status::Good).map(|c| c.0).collect()
    }

    /// Whether it may be pruned.
    fn admits(&self, points: &[Point]) -> bool {
        points.iter().all(|&point| {
            let resumed = self.formations.last().and_then(|formation| formation.1);
            let lives = self.status(point) == Some(Status::Good) && !self.ended && resumed == Some(point);
            self.status(point).is_some() && self.candidates().first() != Some(&point) && !lives
        })
    }

    /// Whether the record is accepted.
    fn apply(&mut self, does: &Does) -> bool {
        match does {
            Does::Form(generation, resume) => {
                let known = resume.is_none_or(|point| self.status(point).is_some());
                let may = *generation > self.generation() && known;
                if may {
                    self.formations.push((*generation, *resume));
                    self.ended = false;
                }
                may
            }
            Does::Commit(step) => {
                let point = (*step, self.generation());
                let may = point.1 > 0 && self.status(point).is_none();
                if may {
                    self.checkpoints.push((point, Status::Good));
                }
                may
            }
            Does::Damage(point) => self.judge(&[*point], |status| match status {
                Status::Good => Status::Damaged,
                other => other,
            }),
            Does::Prune(points) => self.judge(points, |_| Status::Pruned),
            Does::Fail => {
                self.ended |= self.generation() > 0;
                self.generation() > 0
            }
        }
    }

    fn judge(&mut self, points: &[Point], verdict: impl Fn(Status) -> Status) -> bool {
        let may = !points.is_empty() && points.iter().all(|&point| self.status(point).is_some());
        if may {
            for c in self.checkpoints.iter_mut().filter(|c| points.contains(&c.0)) {
                c.1 = verdict(c.1);
            }
        }
        may
    }
}

#[derive(Clone, Debug)]
enum Does {
    Form(u64, Option<Point>),
    Commit(u64),
    Damage(Point),
    Prune(Vec<Point>),
    Fail,
}

fn resume(point: &Point) -> ResumePoint {
    point_of(point.0, point.1)
}

fn point_of(step: u64, generation: u64) -> ResumePoint {
    point(step, generation)
}

impl Does {
    fn record(&self, generation: u64) -> Record {
        match self {
            Self::Form(generation, from) => formed(*generation, from.as_ref().map(resume)),
            Self::Commit(step) => committed(*step, generation),
            Self::Damage((step, generation)) => damaged(*step, *generation),
            Self::Prune(points) => Record::pruned(points.iter().map(resume).collect()),
            Self::Fail => failed(generation),
        }
    }
}

fn does() -> impl Strategy<Value = Does> {
    let point = || (1_u64..30, 1_u64..8);
    prop_oneof![
        2 => (1_u64..9, proptest::option::of(point())).prop_map(|(g, from)| Does::Form(g, from)),
        8 => (1_u64..30).prop_map(Does::Commit),
        2 => point().prop_map(Does::Damage),
        3 => proptest::collection::vec(point(), 0..4).prop_map(Does::Prune),
        1 => Just(Does::Fail),
    ]
}

/// A typical life: steps rise, and judged checkpoints exist.
fn usual() -> impl Strategy<Value = Does> {
    let point = || (1_u64..60, 1_u64..4);
    prop_oneof![
        1 => (1_u64..4, proptest::option::of(point())).prop_map(|(g, from)| Does::Form(g, from)),
        12 => Just(Does::Commit(0)),
        2 => point().prop_map(Does::Damage),
        4 => proptest::collection::vec(point(), 1..3).prop_map(Does::Prune),
    ]
}

fn live(script: Vec<Does>) {
    let (mut state, mut scans) = (state([]), Scans::default());
    for (at, mut does) in script.into_iter().enumerate() {
        if let Does::Commit(step) = &mut does
            && *step == 0
        {
            *step = at as u64 + 1;
        }
        let record = does.record(state.generation().get());
        if let Does::Prune(points) = &does
            && !points.is_empty()
        {
            assert_eq!(admit(&state, &node("a"), None, &record).is_ok(), scans.admits(points), "{does:?}");
        }
        let copy = state.clone();
        let applied = state.apply(state.next(), entry("a", record));
        assert_eq!(applied.is_ok(), scans.apply(&does), "{does:?}: {applied:?}");
        if applied.is_err() {
            assert_eq!(state, copy, "an error changes nothing");
        }
        let points = |found: Vec<&Checkpoint>| -> Vec<Point> {
            found.iter().map(|c| (c.committed.step.get(), c.committed.generation.get())).collect()
        };
        assert_eq!(points(state.candidates()), scans.candidates(), "{does:?}");
        assert_eq!(state.newest(), state.candidates().first().copied());
        assert_eq!(points(state.good()), scans.good(), "{does:?}");
        let all: Vec<Point> = scans.checkpoints.iter().map(|c| c.0).collect();
        assert_eq!((points(state.checkpoints().iter().collect()), state.checkpoints().len()), (all.clone(), all.len()));
        for generation in 0..9 {
            let of = all.iter().copied().filter(|point| point.1 == generation).collect::<Vec<_>>();
            assert_eq!(points(state.checkpoints().of(Generation(generation)).collect()), of);
        }
        for (at, (point, status)) in scans.checkpoints.iter().enumerate() {
            let found = state.checkpoint(Step(point.0), Generation(point.1)).unwrap();
            let same = match found.status {
                CheckpointStatus::Good => Status::Good,
                CheckpointStatus::Damaged { .. } => Status::Damaged,
                CheckpointStatus::Pruned => Status::Pruned,
            };
            assert_eq!((same, found), (*status, &state.checkpoints()[at]));
        }
        assert!(state.checkpoint(Step(99), Generation(1)).is_none());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn the_state_answers_what_the_scans_answered(script in proptest::collection::vec(does(), 1..60)) {
        live(script);
    }

    #[test]
    fn the_state_answers_the_same_in_a_typical_life(script in proptest::collection::vec(usual(), 1..60)) {
        live([Does::Form(1, None)].into_iter().chain(script).collect());
    }
}

#[test]
fn a_copy_of_the_state_stays_as_it_was() {
    let mut state = state([formed(1, None), committed(1, 1), committed(2, 1)]);
    let copy = state.clone();
    for record in [committed(3, 1), pruned(1, 1), damaged(2, 1), notice(1, "x"), interrupted(1)] {
        state.apply(state.next(), entry("a", record)).unwrap();
    }
    assert_eq!((copy.good().len(), copy.checkpoints().len(), copy.notices().len()), (2, 2, 0));
    assert_eq!((state.good().len(), state.checkpoints().len(), state.notices().len()), (1, 3, 1));
}

#[test]
fn several_checkpoints_are_pruned_by_one_record_of_the_new_kind_and_one_by_the_old_kind() {
    let one = Record::pruned(vec![point(1, 1)]);
    assert_eq!((one.format(), one), (1, pruned(1, 1)));
    let two = Record::pruned(vec![point(1, 1), point(2, 1)]);
    assert_eq!((two.format(), two.kind()), (2, "pruned_many"));
    let mut state = state([formed(1, None), committed(1, 1), committed(2, 1), committed(3, 1)]);
    state.apply(4 + 1, entry("a", two)).unwrap();
    assert_eq!(state.good().len(), 1);
    assert!(matches!(
        admit(&state, &node("a"), None, &Record::PrunedMany { checkpoints: vec![] }),
        Err(Refusal::Wrong(_))
    ));
    for bad in [point(3, 1), point(9, 1)] {
        let record = Record::pruned(vec![point(1, 1), bad]);
        assert!(matches!(admit(&state, &node("a"), None, &record), Err(Refusal::Wrong(_))), "{record:?}");
    }
}
