//! Breadth first over all states of a small world, for models of protocols: whole states are compared (no hashing that
//! could hide one), and a counterexample is as short as possible.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    rc::Rc,
};

/// A model: its states are values.
pub trait Model: Clone + Eq + Hash {
    /// Events that must be met somewhere.
    type Sight: Copy + Ord + std::fmt::Debug;

    /// All events that can happen next: what happens, and the state after it.
    fn next(&self, saw: &mut Vec<Self::Sight>) -> Vec<(String, Self)>;

    /// Which invariant is broken in this state.
    fn check(&self) -> Result<(), String>;
}

/// The result of a search.
pub struct Explored<S> {
    /// States met.
    pub states: usize,
    /// Sights met.
    pub saw: Vec<S>,
    /// The shortest path to a state that breaks an invariant, and that invariant.
    pub flaw: Option<(Vec<String>, String)>,
}

/// Searches from `start` until all states are seen or an invariant is broken.
pub fn explore<M: Model>(start: M) -> Explored<M::Sight> {
    let mut known: HashMap<Rc<M>, usize> = HashMap::new();
    // Each state's parent, and the event in between.
    let mut ways: Vec<(usize, String)> = vec![(0, String::new())];
    let start = Rc::new(start);
    known.insert(Rc::clone(&start), 0);
    let mut queue = VecDeque::from([(0, start)]);
    let mut saw = Vec::new();
    while let Some((id, world)) = queue.pop_front() {
        if let Err(flaw) = world.check() {
            let mut trace = Vec::new();
            let mut at = id;
            while at != 0 {
                trace.push(ways[at].1.clone());
                at = ways[at].0;
            }
            trace.reverse();
            return Explored { states: known.len(), saw, flaw: Some((trace, flaw)) };
        }
        for (what, next) in world.next(&mut saw) {
            if known.contains_key(&next) {
                continue;
            }
            let next = Rc::new(next);
            known.insert(Rc::clone(&next), ways.len());
            queue.push_back((ways.len(), next));
            ways.push((id, what));
        }
        saw.sort_unstable();
        saw.dedup();
    }
    Explored { states: known.len(), saw, flaw: None }
}

/// Every state is sound, and every one of `sights` was met.
pub fn expect_sound<M: Model>(start: M, sights: &[M::Sight]) {
    let Explored { states, saw, flaw } = explore(start);
    println!("{states} states, saw {saw:?}");
    if let Some((trace, flaw)) = flaw {
        panic!("{flaw}, after\n  {}", trace.join("\n  "));
    }
    let missing: Vec<_> = sights.iter().filter(|sight| !saw.contains(sight)).collect();
    assert!(missing.is_empty(), "the model never met {missing:?}");
}

/// The search finds the seeded bug `name`, by a flaw that says `part`.
pub fn expect_found<M: Model>(name: &str, start: M, part: &str) {
    let Explored { states, flaw, .. } = explore(start);
    let Some((trace, found)) = flaw else { panic!("{name} was not found in {states} states") };
    println!("{name}: {found}, in {states} states, after\n  {}", trace.join("\n  "));
    assert!(found.contains(part), "{name}: {found}, after\n  {}", trace.join("\n  "));
}
