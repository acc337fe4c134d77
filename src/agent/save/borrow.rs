//! Files of a checkpoint from the memory of other nodes of the generation.
//!
//! The nodes that lived through the last generations ([`Neighbours`]) are asked side by side what they lend
//! ([`Neighbours::ask`]). Each file that is lacking is then read from the one that has least to give so far
//! ([`share`]), one file after the other from each node, side by side over the nodes. A file that one node could not
//! give is asked of one more that has it, when all have given what they were asked for: memory is nearer than the
//! store.
//!
//! # Invariant
//! No node is trusted: a file counts as there when the checksum that was computed over the bytes as they were written
//! to their place is the one of its manifest. Whatever else happens, a refusal, silence, other bytes, the file is left
//! to another node, once, and then to the store, and the log names the node.
//!
//! *Crash, cancel:* connections end. *Retry:* none: the store has everything.

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use tokio::task::{JoinError, JoinSet};

use super::gather::Lacking;
use crate::{
    ids::NodeId,
    rendezvous::channel::{
        LinkSettings, LocalNode, Peer,
        bulk::{NotLent, Reader, Wanted},
    },
    storage::Crc64,
};

#[cfg(test)]
mod tests;

/// Nodes that are asked at most; connections to more would cost more than they bring.
const ASKED: usize = 64;

/// The nodes that may have what this one lacks.
#[derive(Clone, Debug)]
pub struct Neighbours {
    /// This node.
    pub me: Arc<LocalNode>,
    /// The limits of connections.
    pub settings: LinkSettings,
    /// The others, and where they listen: beginning with the one behind this node in the roster.
    pub nodes: Vec<(Peer, SocketAddr)>,
}

/// A node that lends.
pub struct Lender {
    node: NodeId,
    reader: Reader,
    names: HashSet<String>,
}

impl Neighbours {
    /// Asks all of them what they lend; those that lend nothing are left out.
    pub async fn ask(&self, wanted: &Wanted) -> Vec<Lender> {
        let ask = |(peer, address): (Peer, SocketAddr)| {
            let (me, settings, wanted) = (Arc::clone(&self.me), self.settings, wanted.clone());
            async move {
                let asking = async {
                    let mut reader = Reader::dial(address, &peer, &me, settings).await?;
                    let names = reader.open(&wanted).await?;
                    Ok::<_, NotLent>((reader, names))
                };
                match asking.await {
                    Ok((_, names)) if names.is_empty() => None,
                    Ok((reader, names)) => Some(Lender { node: peer.node, reader, names: names.into_iter().collect() }),
                    Err(reason) => {
                        tracing::info!(node = %peer.node, %reason, "this node lends nothing of the checkpoint");
                        None
                    }
                }
            }
        };
        let asked = self.nodes.iter().take(ASKED).cloned().map(ask);
        futures::future::join_all(asked).await.into_iter().flatten().collect()
    }
}

/// Which lender gives each file, as an index; `None`: nobody has it. The largest come first, each to the lender with
/// the fewest bytes to give so far.
fn share(files: &[(&str, u64)], lenders: &[&HashSet<String>]) -> Vec<Option<usize>> {
    let mut order: Vec<usize> = (0..files.len()).collect();
    order.sort_by_key(|&file| std::cmp::Reverse(files[file].1));
    let mut loads = vec![0_u64; lenders.len()];
    let mut shares = vec![None; files.len()];
    for file in order {
        let (name, bytes) = files[file];
        let have = (0..lenders.len()).filter(|&lender| lenders[lender].contains(name));
        shares[file] = have.min_by_key(|&lender| loads[lender]);
        if let Some(lender) = shares[file] {
            loads[lender] = loads[lender].saturating_add(bytes);
        }
    }
    shares
}

/// What comes from where.
pub struct Shares<B> {
    /// What each lender gives; perhaps nothing.
    pub of: Vec<(Lender, Vec<Lacking<B>>)>,
    /// What nobody lends.
    pub left: Vec<Lacking<B>>,
}

/// What came of the files that were lacking.
pub struct Borrowed<B> {
    /// Files that are there now.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The others.
    pub left: Vec<Lacking<B>>,
}

/// Divides `lacking` among the lenders.
pub fn divide<B>(lenders: Vec<Lender>, lacking: Vec<Lacking<B>>) -> Shares<B> {
    let shares = {
        let files: Vec<(&str, u64)> = lacking.iter().map(|it| (it.file.name.as_str(), it.file.bytes)).collect();
        share(&files, &lenders.iter().map(|lender| &lender.names).collect::<Vec<_>>())
    };
    let mut left = Vec::new();
    let mut of: BTreeMap<usize, Vec<Lacking<B>>> = BTreeMap::new();
    for (it, share) in lacking.into_iter().zip(shares) {
        match share {
            // A file that can't be compared, or that has no byte, is the store's.
            Some(lender) if it.file.crc64.is_some() && it.file.bytes > 0 => of.entry(lender).or_default().push(it),
            _ => left.push(it),
        }
    }
    let with_files = |(at, lender)| (lender, of.remove(&at).unwrap_or_default());
    Shares { of: lenders.into_iter().enumerate().map(with_files).collect(), left }
}

impl<B> Borrowed<B> {
    const fn nothing() -> Self {
        Self { files: 0, bytes: 0, left: Vec::new() }
    }

    fn add(&mut self, more: Self) {
        self.files += more.files;
        self.bytes += more.bytes;
        self.left.extend(more.left);
    }
}

/// Reads from the lenders what they have; what one of them could not give, from another one.
pub async fn read<B: AsMut<[u8]> + Send + 'static>(shares: Vec<(Lender, Vec<Lacking<B>>)>) -> Borrowed<B> {
    let mut borrowed = Borrowed::nothing();
    let mut refused = Vec::new();
    let mut lenders = Vec::new();
    for (mut one, lender) in all_from(shares).await {
        let by = lender.as_ref().map(|lender| lender.node.clone());
        refused.extend(one.left.drain(..).map(|it| (it, by.clone())));
        borrowed.add(one);
        lenders.extend(lender);
    }
    let mut again: Vec<(Lender, Vec<Lacking<B>>)> = lenders.into_iter().map(|lender| (lender, Vec::new())).collect();
    for (it, by) in refused {
        let has = |lender: &Lender| Some(&lender.node) != by.as_ref() && lender.names.contains(&it.file.name);
        let others = again.iter_mut().filter(|(lender, _)| has(lender));
        match others.min_by_key(|(_, files)| files.iter().map(|it| it.file.bytes).sum::<u64>()) {
            Some((_, files)) => files.push(it),
            None => borrowed.left.push(it),
        }
    }
    for (one, _) in all_from(again).await {
        borrowed.add(one);
    }
    borrowed
}

/// Reads from all of them side by side, each on a task of its own: what comes is decrypted, copied and summed, for
/// which one core would be too slow. Dropping the future stops them.
async fn all_from<B: AsMut<[u8]> + Send + 'static>(
    shares: Vec<(Lender, Vec<Lacking<B>>)>,
) -> Vec<(Borrowed<B>, Option<Lender>)> {
    let reading = shares.into_iter().enumerate().map(|(at, (lender, files))| async move {
        let read = from(lender, files).await;
        (at, read)
    });
    let mut reading: JoinSet<_> = reading.collect();
    let mut done = Vec::new();
    while let Some(read) = reading.join_next().await {
        match read.map_err(JoinError::try_into_panic) {
            Ok(read) => done.push(read),
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The runtime ends.
            Err(Err(_)) => std::future::pending().await,
        }
    }
    done.sort_unstable_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, read)| read).collect()
}

/// Reads these files from one node. The node comes back unless its connection can't be used any more.
async fn from<B: AsMut<[u8]> + Send>(mut lender: Lender, files: Vec<Lacking<B>>) -> (Borrowed<B>, Option<Lender>) {
    let mut borrowed = Borrowed::nothing();
    let mut files = files.into_iter();
    while let Some(mut it) = files.next() {
        let read = whole(&mut lender.reader, &mut it).await;
        let (node, file) = (&lender.node, &it.file.name);
        match read {
            Ok(sum) if Some(sum) == it.file.crc64 => {
                borrowed.files += 1;
                borrowed.bytes += it.file.bytes;
            }
            Ok(_) => {
                tracing::warn!(%node, file, "a node's memory no longer has this file of the checkpoint");
                borrowed.left.push(it);
            }
            Err(NotLent::Refused(reason)) => {
                tracing::info!(%node, file, %reason, "a node does not lend this file of the checkpoint");
                borrowed.left.push(it);
            }
            // What comes next on that connection has no meaning any more.
            Err(reason) => {
                tracing::warn!(%node, file, %reason, "a node has stopped lending files of the checkpoint");
                borrowed.left.push(it);
                borrowed.left.extend(files);
                return (borrowed, None);
            }
        }
    }
    (borrowed, Some(lender))
}

/// Reads all pieces of a file, in its order, and returns its checksum.
async fn whole<B: AsMut<[u8]>>(reader: &mut Reader, lacking: &mut Lacking<B>) -> Result<Crc64, NotLent> {
    let (mut sum, mut end) = (Crc64::EMPTY, 0);
    lacking.pieces.sort_by_key(|(piece, _)| piece.offset);
    for (piece, buffer) in &mut lacking.pieces {
        let read = reader.read(&lacking.file.name, piece.offset, buffer.as_mut()).await?;
        // A gap, or pieces that overlap, give another sum.
        (sum, end) = (sum.followed_by(read, piece.len), end + piece.len);
    }
    Ok(if end == lacking.file.bytes { sum } else { Crc64(!lacking.file.crc64.unwrap_or_default().0) })
}
