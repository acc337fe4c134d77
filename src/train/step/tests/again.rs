//! A rank that leaves its peers between two steps and goes on with others has the bits of one that has loaded the
//! checkpoint of that step. Each process is a thread that outlives its groups.

use std::sync::{Barrier, Mutex};

use super::*;
use crate::torch::{Backend, Store};

/// Steps in each world.
const EACH: u64 = 3;

/// The bits of losses and norms, and the state after the last of these steps.
type Lived = (Vec<[u64; 2]>, Held);

/// A rank of an earlier world, in this one.
fn again(run: &Run, mut before: Training, group: Option<ProcessGroup>) -> (Training, State) {
    let (rank, world) = group.as_ref().map_or((Rank(0), WorldSize(1)), |group| (group.rank(), group.world()));
    before.rest().unwrap();
    let place = Place { rank, world, device: Device::Cpu };
    let Built { state, base, lesson, layout, train, place } = Built::again(before, &run.parallel, place).unwrap();
    let built = Built { state: State::new(lesson.leaves(), &[]).unwrap(), base, lesson, layout, train, place };
    (built.start(&run.data, Peers::new(group)).unwrap(), state)
}

/// Where the tensors of a state lie.
fn places(state: &State) -> Vec<*mut std::ffi::c_void> {
    state.tensors().iter().map(Tensor::data_ptr).collect()
}

/// What every rank lives through in each of these worlds. Those that a world has more than the one before load.
fn lives(run: &Run, worlds: &[u32]) -> Vec<Vec<Lived>> {
    let most = worlds.iter().copied().max().unwrap();
    let stores: Vec<Store> = worlds.iter().map(|_| Store::serve("127.0.0.1", 0, LIMIT).unwrap()).collect();
    let ports: Vec<u16> = stores.iter().map(Store::port).collect();
    let lived: Vec<Mutex<Vec<Option<Lived>>>> =
        worlds.iter().map(|_| Mutex::new((0..most).map(|_| None).collect())).collect();
    let all = Barrier::new(most as usize);
    let group = |at: usize, number: u32| {
        let world = WorldSize(worlds[at]);
        (world.get() > 1).then(|| {
            let store = Store::connect("127.0.0.1", ports[at], LIMIT).unwrap();
            let made = ProcessGroup::new(Backend::Gloo, &store, "test", Rank(number), world, LIMIT, Device::Cpu);
            let made = made.unwrap();
            made.barrier().unwrap();
            made
        })
    };
    let life = |number: u32| {
        let mut mine: Option<(Training, State)> = None;
        for (at, world) in worlds.iter().enumerate() {
            if number < *world {
                let group = group(at, number);
                let (mut training, state) = match mine.take() {
                    Some((before, state)) => {
                        let (training, kept) = again(run, before, group);
                        assert_eq!(places(&kept), places(&state), "nothing is copied");
                        (training, kept)
                    }
                    None if at == 0 => rank(run, group, None),
                    None => {
                        let before = lived[at - 1].lock().unwrap();
                        let saved: Vec<Held> = before.iter().flatten().map(|(_, held)| held.clone()).collect();
                        drop(before);
                        rank(run, group, Some(&files(&saved)))
                    }
                };
                let first = EACH * at as u64 + 1;
                let bits = train(&mut training, first..=first + EACH - 1);
                lived[at].lock().unwrap()[number as usize] = Some((bits, held(&state)));
                mine = Some((training, state));
            } else {
                mine = None;
            }
            // The step is saved on all ranks.
            all.wait();
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..most).map(|number| scope.spawn(move || (life)(number))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    let lived = lived.into_iter().map(|of| of.into_inner().unwrap().into_iter().flatten().collect());
    lived.collect()
}

#[test]
fn a_world_of_ranks_that_lived_on_has_the_bits_of_one_that_has_loaded() {
    use config::Strategy::Ddp;
    for (worlds, precision) in [
        ([1, 2, 1], Precision::Fp32),
        ([1, 2, 1], Precision::Bf16),
        ([2, 3, 2], Precision::Fp32),
        ([2, 3, 2], Precision::Bf16),
        ([2, 1, 3], Precision::Fp32),
    ] {
        let case = format!("{worlds:?} {precision:?}");
        let run = run(Ddp, precision, 2);
        let lived = lives(&run, &worlds);
        for at in 1..worlds.len() {
            let saved: Vec<Held> = lived[at - 1].iter().map(|(_, held)| held.clone()).collect();
            let (saved, first) = (files(&saved), EACH * at as u64 + 1);
            let loaded = everywhere(worlds[at], |group| {
                let (mut training, state) = rank(&run, group, Some(&saved));
                (train(&mut training, first..=first + EACH - 1), held(&state))
            });
            assert_eq!(lived[at].len(), loaded.len(), "{case}");
            for (lived, loaded) in lived[at].iter().zip(&loaded) {
                assert_eq!(lived.0, loaded.0, "{case}, world {at}: losses and norms");
                assert!(lived.1 == loaded.1, "{case}, world {at}: other bytes");
            }
        }
    }
}

/// Other ranks have parts of it: it can't be had in another world from here alone.
#[test]
fn a_state_of_which_ranks_have_parts_is_loaded() {
    use config::Strategy::{Shard, Zero1};
    for strategy in [Zero1, Shard] {
        let run = run(strategy, Precision::Fp32, 2);
        let refused = everywhere(2, |group| {
            let (mut training, _) = rank(&run, group, None);
            train(&mut training, 1..=1);
            training.rest().unwrap();
            let place = Place { rank: Rank(0), world: WorldSize(1), device: Device::Cpu };
            Built::again(training, &run.parallel, place).map(|_| ()).unwrap_err().to_string()
        });
        assert!(refused.iter().all(|why| why.contains("have parts")), "{refused:?}");
        // Alone it had everything, and would have a part of it among others.
        let (alone, _) = rank(&run, None, None);
        let place = Place { rank: Rank(0), world: WorldSize(2), device: Device::Cpu };
        assert!(Built::again(alone, &run.parallel, place).is_err());
    }
}
