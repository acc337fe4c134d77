//! Sequences that are read ahead are those that would be read at once, and so are the errors.

use super::*;
use crate::{
    config::{Spread, Strategy::Ddp},
    data::{Sampler, Split},
    train::reader::{Corpus, Order, Reader},
};

fn reader(run: &Run, rank: Rank, world: WorldSize, last: u64) -> Reader {
    let dataset = Dataset::open(run.folder.path()).unwrap();
    let sampler = Sampler::over(&dataset, Split::Train, SEQUENCE as u32, 7).unwrap();
    let passes = Spread::new(8, world, 2).unwrap().passes(rank);
    let order = Order { passes, global_batch: 8, rank, world, last: Step(last) };
    let source = Corpus { dataset: dataset.into(), sampler, length: SEQUENCE as u32, device: Device::Cpu };
    Reader::new(source, order)
}

/// Every pass of these steps, in order.
fn passes(rank: Rank, world: WorldSize, steps: RangeInclusive<u64>) -> Vec<std::ops::Range<u64>> {
    let mut all = Vec::new();
    for step in steps {
        let mut begin = positions(Step(step), 8, rank, world).start;
        for pass in Spread::new(8, world, 2).unwrap().passes(rank).iter() {
            all.push(begin..begin + u64::from(pass.sequences));
            begin += u64::from(pass.sequences);
        }
    }
    all
}

/// What there is at these positions, or why it can't be read.
fn tokens(sequences: Result<crate::train::reader::Sequences, crate::train::batch::BatchError>) -> String {
    match sequences {
        Ok(sequences) => format!("{:?}", Vec::<i64>::try_from(sequences.tokens.flatten(0, -1)).unwrap()),
        Err(error) => format!("{error} {error:?}"),
    }
}

#[test]
fn passes_that_were_read_ahead_are_those_that_were_asked_for_in_whatever_order() {
    let run = run(Ddp, Precision::Fp32, 2);
    for (rank, world) in [(0, 1), (1, 2), (2, 3)].map(|(rank, world)| (Rank(rank), WorldSize(world))) {
        let mut reader = reader(&run, rank, world, 6);
        // To the last step, back as after a resume, beyond the end, and not a pass at all.
        let mut asked = passes(rank, world, 1..=6);
        asked.extend(passes(rank, world, 3..=4));
        asked.extend(passes(rank, world, 7..=8));
        asked.extend([0..8, 3..4]);
        let mut seen = std::collections::BTreeSet::new();
        for at in asked {
            let directly = tokens(reader.source().at_positions(at.clone()));
            assert_eq!(tokens(reader.take(at.clone())), directly, "{at:?}");
            seen.insert(directly);
        }
        assert!(seen.len() > 8, "the same again and again");
    }
}

#[test]
fn an_error_comes_with_the_pass_in_which_it_is_and_in_the_same_words() {
    let run = run(Ddp, Precision::Fp32, 2);
    let mut reader = reader(&run, Rank(0), WorldSize(1), 20);
    let (good, bad) = (reader.take(0..2), std::fs::read_dir(run.folder.path()).unwrap());
    good.unwrap();
    let shard = bad.map(|entry| entry.unwrap().path()).find(|path| path.ends_with("train-00000.bin")).unwrap();
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::OpenOptions::new().write(true).open(&shard).unwrap().set_len(bytes.len() as u64 / 2).unwrap();
    let (mut errors, mut read) = (0, 0);
    // What was read before the file became shorter may be there: from the third pass on nothing was.
    for at in passes(Rank(0), WorldSize(1), 1..=12).into_iter().skip(4) {
        let directly = tokens(reader.source().at_positions(at.clone()));
        let ahead = tokens(reader.take(at.clone()));
        assert_eq!(ahead, directly, "{at:?}");
        if ahead.contains("has become shorter") { errors += 1 } else { read += 1 }
    }
    assert!(errors > 3 && read > 3, "{errors} {read}");
}
