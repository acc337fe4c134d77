//! What a desk has others do: requests to the store, and dials. Each runs as a task of its own and ends as [`News`].
//!
//! *Crash, cancel:* nothing is changed in the store but a heartbeat that is buried. *Retry:* the seat asks again.

use std::time::Duration;

use futures::StreamExt;
use tokio::{sync::mpsc, task::JoinSet};

use super::Words;
use crate::{
    ids::NodeId,
    journal::JournalWriter,
    layout,
    rendezvous::{
        heartbeat::{self, Group},
        membership::Listed,
        peers::Peers,
        seat::{Beat, Body, Input},
    },
    storage::{ObjectInfo, StorageError, Store},
};

/// The time for which other nodes are dialled to find out whether they can be reached.
const PROBE: Duration = Duration::from_secs(2);
/// Heartbeats that are read side by side.
const SIDE_BY_SIDE: usize = 16;

/// What an errand has to say.
pub(super) enum News {
    /// For the seat.
    Input(Input),
    /// The heartbeats of nodes that knocked, or may have.
    Met(Vec<(NodeId, Group)>),
    /// The heartbeat of a node that a message is for.
    Found(NodeId, Option<Group>, Body),
}

/// All that errands need, and those under way.
pub(super) struct Errands {
    run: Store,
    journal: JournalWriter,
    links: Peers<Words>,
    news: mpsc::UnboundedSender<News>,
    tasks: JoinSet<()>,
}

impl Errands {
    pub fn new(run: Store, journal: JournalWriter, links: Peers<Words>) -> (Self, mpsc::UnboundedReceiver<News>) {
        let (news, given) = mpsc::unbounded_channel();
        (Self { run, journal, links, news, tasks: JoinSet::new() }, given)
    }

    /// Forgets one that has ended. May be dropped at any moment.
    pub async fn forget(&mut self) -> bool {
        self.tasks.join_next().await.is_some()
    }

    /// Says something after what was said before.
    pub fn says(&self, input: Input) {
        let _ = self.news.send(News::Input(input));
    }

    fn send(&mut self, errand: impl Future<Output = News> + Send + 'static) {
        let news = self.news.clone();
        self.tasks.spawn(async move {
            let _ = news.send(errand.await);
        });
    }

    /// This input, after a pause.
    pub fn later(&mut self, pause: Duration, input: Input) {
        self.send(async move {
            tokio::time::sleep(pause).await;
            News::Input(input)
        });
    }

    /// Reads the journal on.
    pub fn read_journal(&mut self) {
        let journal = self.journal.clone();
        self.send(async move {
            let read = journal.refresh().await;
            News::Input(if read.is_ok() { Input::Journal(Vec::new()) } else { Input::Failed })
        });
    }

    /// Lists the heartbeats.
    pub fn list(&mut self) {
        let run = self.run.clone();
        self.send(async move { News::Input(listed(&run).await.map_or(Input::Failed, Input::Listed)) });
    }

    /// Reads the heartbeats of these nodes; `began`: the seat's time now.
    pub fn read_beats(&mut self, nodes: Vec<NodeId>, began: Duration) {
        let run = self.run.clone();
        self.send(async move {
            let read = |node: NodeId| {
                let run = &run;
                async move {
                    let found = heartbeat::read(run, &node).await;
                    (node, found)
                }
            };
            let found: Vec<_> = futures::stream::iter(nodes).map(read).buffered(SIDE_BY_SIDE).collect().await;
            let mut beats = Vec::with_capacity(found.len());
            for (node, found) in found {
                match found {
                    Ok(found) => {
                        let beat = found.and_then(|beat| Some(Beat { counter: beat.counter, group: beat.group? }));
                        beats.push((node, beat));
                    }
                    Err(error) => {
                        tracing::debug!(%node, %error, "a heartbeat could not be read");
                        return News::Input(Input::Failed);
                    }
                }
            }
            News::Input(Input::Beats { began, beats })
        });
    }

    /// Reads where a node is that a message is for.
    pub fn find(&mut self, node: NodeId, body: Body) {
        let run = self.run.clone();
        self.send(async move {
            let beat = heartbeat::read(&run, &node).await.ok().flatten();
            News::Found(node, beat.and_then(|beat| beat.group), body)
        });
    }

    /// Removes the heartbeats of these nodes, if they are stale.
    pub fn bury(&mut self, nodes: Vec<NodeId>) {
        let run = self.run.clone();
        self.tasks.spawn(async move {
            for node in nodes {
                heartbeat::remove_stale(&run, &node).await;
            }
        });
    }

    /// Finds out which of these nodes can't be reached, for the round of this proposer.
    pub fn probe(&mut self, round: u64, by: NodeId, nodes: Vec<NodeId>) {
        let (links, run, news) = (self.links.clone(), self.run.clone(), self.news.clone());
        self.send(async move {
            // Of a newcomer this node knows nothing yet: its heartbeat says where it is.
            let strangers = nodes.iter().filter(|node| !links.knows(node)).cloned().collect();
            let _ = tokio::time::timeout(PROBE, meet(&run, &links, &news, strangers)).await;
            let unreachable = links.unreachable(nodes, PROBE).await;
            News::Input(Input::Probed { round, by, unreachable })
        });
    }

    /// Somebody with an unknown key knocked: its heartbeat is among those that were not read yet.
    pub fn meet_strangers(&mut self) {
        let (run, links) = (self.run.clone(), self.links.clone());
        self.send(async move {
            let listed = listed(&run).await.unwrap_or_default();
            let nodes = listed.into_iter().map(|listed| listed.node).filter(|node| !links.knows(node)).collect();
            News::Met(read_groups(&run, nodes).await)
        });
    }
}

/// Tells the links where these nodes are, as far as their heartbeats say so, and the desk what they say.
async fn meet(run: &Store, links: &Peers<Words>, news: &mpsc::UnboundedSender<News>, nodes: Vec<NodeId>) {
    let read = |node: NodeId| async move { (heartbeat::read(run, &node).await, node) };
    let mut found = futures::stream::iter(nodes).map(read).buffer_unordered(SIDE_BY_SIDE);
    while let Some((beat, node)) = found.next().await {
        let Some(group) = beat.ok().flatten().and_then(|beat| beat.group) else { continue };
        if let Ok(address) = group.address.parse() {
            links.know(node.clone(), address, group.key.clone());
        }
        let _ = news.send(News::Met(vec![(node, group)]));
    }
}

/// What the heartbeats of these nodes say, of those that have one.
async fn read_groups(run: &Store, nodes: Vec<NodeId>) -> Vec<(NodeId, Group)> {
    let read = |node: NodeId| async move {
        let beat = heartbeat::read(run, &node).await.ok().flatten();
        Some((node, beat?.group?))
    };
    futures::stream::iter(nodes).map(read).buffer_unordered(SIDE_BY_SIDE).filter_map(std::future::ready).collect().await
}

/// The heartbeats in the store, with the times at which it took them.
async fn listed(run: &Store) -> Result<Vec<Listed>, StorageError> {
    let found = run.list(&format!("{}/", layout::NODES)).await?;
    let stamp =
        |object: &ObjectInfo| Some(Listed { node: layout::heartbeat_node(&object.key)?, stored: object.last_modified });
    Ok(found.iter().filter_map(stamp).collect())
}
