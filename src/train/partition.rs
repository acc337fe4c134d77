//! The assignment of elements to ranks under ZeRO (Rajbhandari et al., arXiv 1910.02054, stages 1 and 3).
//!
//! Trained parameters lie one after the other in buckets: the last one first, because gradients arrive about in that
//! order, in buckets of about one size ([`Partition::new`]); or in buckets that somebody else has chosen
//! ([`Partition::of`]). Each bucket is cut into as many equal chunks as there are ranks, and rank r has chunk r of
//! every bucket: its moments, its fp32 weights, its update. So a large embedding is divided like everything else, and a
//! bucket can be reduced, updated and gathered while others are still computed (as in Megatron-LM's distributed
//! optimizer).
//!
//! Invariants: the partition is a pure function of (lengths, world size, bucket sizes), the same on every rank and
//! after a resume. Chunks begin on multiples of [`ALIGN`] elements, so no rank has more than the average and `ALIGN`
//! elements of each bucket.

use crate::{
    ids::{Rank, WorldSize},
    torch::Bucket,
};

/// Elements: 128 bytes of bf16, a whole number of cache lines and of the widest vectors.
pub const ALIGN: u64 = 64;
/// Bytes of an element of a gradient.
const GRADIENT_BYTES: u64 = 4;

/// One parameter in its bucket; counts are elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The parameter's number among the trained ones.
    pub param: usize,
    /// Where in the bucket it begins.
    pub offset: u64,
    /// Elements.
    pub len: u64,
}

/// Parameters that are reduced and gathered together; counts are elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// One after the other, without a gap.
    pub members: Vec<Member>,
    /// Of all members.
    pub len: u64,
    /// Of one rank, a multiple of [`ALIGN`]; the last ranks' chunks may be beyond the end, wholly or in part.
    pub chunk: u64,
}

/// A rank's share of one parameter; counts are elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The bucket's number.
    pub bucket: usize,
    /// The parameter's number among the trained ones.
    pub param: usize,
    /// The first element within the parameter.
    pub begin: u64,
    /// The one after the last.
    pub end: u64,
    /// Where in the rank's chunk it begins.
    pub at: u64,
}

/// The assignment of elements to ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    world: WorldSize,
    buckets: Vec<Section>,
}

impl Partition {
    /// Of parameters with these numbers of elements. A bucket is full when it has reached its size, in bytes of
    /// gradients; the first one is small so that the first reduction starts early.
    pub fn new(lens: &[u64], world: WorldSize, first_bucket_bytes: u64, bucket_bytes: u64) -> Self {
        let mut buckets: Vec<Section> = Vec::new();
        let mut open = false;
        for (param, &len) in lens.iter().enumerate().rev() {
            if !open {
                buckets.push(Section { members: Vec::new(), len: 0, chunk: 0 });
            }
            let limit = if buckets.len() == 1 { first_bucket_bytes } else { bucket_bytes };
            if let Some(bucket) = buckets.last_mut() {
                bucket.members.push(Member { param, offset: bucket.len, len });
                bucket.len += len;
                open = bucket.len * GRADIENT_BYTES < limit;
            }
        }
        Self::with_chunks(buckets, world)
    }

    /// Of buckets that consist of these parameters, in their order; `lens`: the elements of every parameter.
    pub fn of(buckets: &[Vec<usize>], lens: &[u64], world: WorldSize) -> Self {
        let section = |params: &Vec<usize>| {
            let mut section = Section { members: Vec::with_capacity(params.len()), len: 0, chunk: 0 };
            for &param in params {
                section.members.push(Member { param, offset: section.len, len: lens[param] });
                section.len += lens[param];
            }
            section
        };
        Self::with_chunks(buckets.iter().map(section).collect(), world)
    }

    fn with_chunks(mut buckets: Vec<Section>, world: WorldSize) -> Self {
        for bucket in &mut buckets {
            bucket.chunk = bucket.len.div_ceil(u64::from(world.get()).max(1)).next_multiple_of(ALIGN).max(ALIGN);
        }
        Self { world, buckets }
    }

    /// The buckets, in the order in which gradients arrive.
    pub fn buckets(&self) -> &[Section] {
        &self.buckets
    }

    /// How many ranks there are.
    pub fn world(&self) -> WorldSize {
        self.world
    }

    /// The buckets in the form that a reducer takes.
    pub fn for_reducer(&self) -> Vec<Bucket> {
        let params = |bucket: &Section| bucket.members.iter().map(|member| member.param).collect();
        self.buckets.iter().map(|bucket| Bucket { params: params(bucket), chunk: bucket.chunk }).collect()
    }

    /// Where in a bucket a rank's chunk begins, and how many of its elements belong to parameters rather than padding.
    pub fn chunk(&self, bucket: usize, rank: Rank) -> (u64, u64) {
        let bucket = &self.buckets[bucket];
        let start = u64::from(rank.get()) * bucket.chunk;
        (start, bucket.len.saturating_sub(start).min(bucket.chunk))
    }

    /// A rank's pieces, bucket by bucket, in the order of its chunks.
    pub fn pieces(&self, rank: Rank) -> impl Iterator<Item = Piece> + '_ {
        self.buckets.iter().enumerate().flat_map(move |(number, bucket)| {
            let (start, owned) = self.chunk(number, rank);
            bucket.members.iter().filter_map(move |member| {
                let begin = start.max(member.offset);
                let end = (start + owned).min(member.offset + member.len);
                (begin < end).then(|| Piece {
                    bucket: number,
                    param: member.param,
                    begin: begin - member.offset,
                    end: end - member.offset,
                    at: begin - start,
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_fill_from_the_last_parameter_and_a_large_one_is_shared_out() {
        let partition = Partition::new(&[10_000, 100, 20, 300], WorldSize(3), 1024, 2000);
        let members: Vec<Vec<usize>> =
            partition.buckets().iter().map(|b| b.members.iter().map(|m| m.param).collect()).collect();
        assert_eq!(members, [vec![3], vec![2, 1, 0]]);
        assert_eq!(partition.buckets()[0].chunk, 128);
        assert_eq!(partition.chunk(0, Rank(2)), (256, 44));
        let pieces: Vec<Piece> = partition.pieces(Rank(1)).collect();
        assert_eq!(pieces[0], Piece { bucket: 0, param: 3, begin: 128, end: 256, at: 0 });
        assert_eq!(pieces[1], Piece { bucket: 1, param: 0, begin: 3392 - 120, end: 2 * 3392 - 120, at: 0 });
        assert_eq!(pieces.len(), 2);
        let tiny = Partition::new(&[5], WorldSize(2), 1024, 1024);
        assert_eq!((tiny.chunk(0, Rank(0)), tiny.chunk(0, Rank(1))), ((0, 5), (64, 0)));
    }

    #[test]
    fn buckets_that_are_given_are_cut_into_chunks_like_others() {
        let lens = [10_000, 100, 20, 300];
        let given = Partition::of(&[vec![3], vec![2, 1, 0]], &lens, WorldSize(3));
        assert_eq!(given, Partition::new(&lens, WorldSize(3), 1024, 2000));
        let other = Partition::of(&[vec![0], vec![1, 3], vec![2]], &lens, WorldSize(2));
        let pieces: Vec<Piece> = other.pieces(Rank(1)).collect();
        assert_eq!(pieces[0], Piece { bucket: 0, param: 0, begin: 5056, end: 10_000, at: 0 });
        assert_eq!(pieces[1], Piece { bucket: 1, param: 3, begin: 156, end: 300, at: 0 });
        // All of the last bucket is in the first rank's chunk.
        assert_eq!(pieces.len(), 2);
    }

    proptest! {
        #[test]
        fn every_element_has_one_rank_and_ranks_have_about_the_same(
            lens in proptest::collection::vec(0_u64..3000, 1..30), world in 1_u32..9, bucket in 4_u64..8192
        ) {
            let partition = Partition::new(&lens, WorldSize(world), bucket / 2, bucket);
            let mut ranges: Vec<Vec<std::ops::Range<u64>>> = vec![Vec::new(); lens.len()];
            let total: u64 = lens.iter().sum();
            for rank in (0..world).map(Rank) {
                let mut have = 0;
                for piece in partition.pieces(rank) {
                    ranges[piece.param].push(piece.begin..piece.end);
                    let (start, owned) = partition.chunk(piece.bucket, rank);
                    let members = &partition.buckets()[piece.bucket].members;
                    let member = members.iter().find(|member| member.param == piece.param).unwrap();
                    prop_assert_eq!(start + piece.at, member.offset + piece.begin);
                    prop_assert!(piece.at + (piece.end - piece.begin) <= owned);
                    have += piece.end - piece.begin;
                }
                prop_assert!(have <= total / u64::from(world) + (ALIGN + 1) * partition.buckets().len() as u64);
                let owned: u64 = (0..partition.buckets().len()).map(|number| partition.chunk(number, rank).1).sum();
                prop_assert_eq!(have, owned);
            }
            for (ranges, &len) in ranges.into_iter().zip(&lens) {
                prop_assert_eq!(crate::format::slices::check_cover(ranges, len), Ok(()));
            }
            for bucket in partition.buckets() {
                prop_assert_eq!(bucket.chunk % ALIGN, 0);
                prop_assert!(bucket.chunk * u64::from(world) >= bucket.len);
            }
        }
    }
}
