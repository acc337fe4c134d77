//! A node's part of a save: the shards of its own ranks, then its receipt.
//!
//! Runs as a task beside the event loop, one at a time. It uploads the very pages that the workers wrote; they are lent
//! to it, and given back when it ends. The leader gives the attempt and waits for the end on every node
//! ([`upload`](super::upload)): a slot is given out again only then.
//!
//! *Crash:* the files are garbage that no record names. *Retry:* the leader orders the same snapshot again, as another
//! attempt. *Cancel:* nothing more is written, and nothing more is said, but requests already sent to the store may
//! land.

use tokio::{sync::mpsc, task::AbortHandle};

use crate::{
    checkpoint::save::{Receipt, Save, put_shards},
    error::{Error, Kind, Result},
    ids::NodeId,
    storage::Store,
};

/// What a node says of its part of a save.
#[derive(Debug)]
pub enum Put {
    /// This many more bytes have reached the store.
    Progress(u64),
    /// Its part has ended. The last word about it.
    Ended(NodeId, Result<Receipt>),
}

/// Starts putting this node's files; the outcome goes to `says`. The handle cancels it.
pub fn start(run: Store, save: Save, says: mpsc::UnboundedSender<Put>) -> AbortHandle {
    let (step, node) = (save.step, save.node.clone());
    let progress = {
        let says = says.clone();
        move |bytes| {
            let _ = says.send(Put::Progress(bytes));
        }
    };
    // A task of its own: in every case the leader must hear of its end, or it would never save again.
    let putting = tokio::spawn(async move { put_shards(&run, &save, progress).await });
    let cancel = putting.abort_handle();
    tokio::spawn(async move {
        let result = match putting.await {
            Ok(result) => result.map_err(Error::from),
            Err(error) if error.is_cancelled() => return,
            Err(error) => Err(Error::from_source(Kind::Bug, error).context(format!("save step {step}"))),
        };
        let _ = says.send(Put::Ended(node, result));
    });
    cancel
}
