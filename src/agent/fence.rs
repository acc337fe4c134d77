//! A look at the journal now and then: has another agent taken the run, and does the journal still stand?
//!
//! It runs beside the event loop, which receives its findings. Writers of the journal take precedence.

use std::time::Duration;

use crate::{
    error::{Error, Kind, Result},
    ids::{Generation, NodeId},
    journal::{self, JournalError, JournalWriter},
    layout,
    storage::{StorageError, Store},
};

/// How often the journal is checked, and how long a check may take.
pub const LOOK: Duration = Duration::from_secs(5);

/// Looks once, for node `me`, which works in `generation`. An agent that was asleep or cut off while another formed the
/// next generation learns of it here at the latest; any commit that it tries before that is refused anyway. An agent
/// whose store was emptied or unmounted learns of it here, rather than after weeks of training; so does one whose own
/// journal task has ended. `Some`: why the run can't go on here.
pub async fn look_once(journal: &JournalWriter, run: &Store, me: &NodeId, generation: Generation) -> Option<Error> {
    match tokio::time::timeout(LOOK, look(journal, run, me, generation)).await {
        Ok(Ok(end)) => return end,
        Ok(Err(error)) => tracing::debug!(%error, "could not check the journal"),
        Err(_) => tracing::debug!("could not check the journal: the store does not answer"),
    }
    None
}

/// Why the run can't go on here, if it can't.
async fn look(journal: &JournalWriter, run: &Store, me: &NodeId, generation: Generation) -> Result<Option<Error>> {
    let newest = {
        let view = match journal.look().await {
            // Nothing can be committed any more: each further step would be lost.
            Err(error @ JournalError::NoWriter) => return Ok(Some(error.into())),
            other => other?,
        };
        // If the journal is busy, its user finds out by itself.
        let Some(view) = view else { return Ok(None) };
        if let Some(refusal) = journal::fenced(&view.state, me, generation) {
            return Ok(Some(refusal.into_error("formed").into()));
        }
        layout::journal_entry(view.state.next().saturating_sub(1))
    };
    match run.head(&newest).await {
        Ok(_) => Ok(None),
        Err(StorageError::NotFound { key }) => Ok(Some(match run.holds().await {
            Err(adrift) => adrift.into(),
            Ok(()) => gone(&key),
        })),
        Err(error) => Err(error.into()),
    }
}

fn gone(record: &str) -> Error {
    let what = format!("journal record {record} is gone, and so may be all of the run");
    Error::new(Kind::Unavailable, what)
        .with_hint("nothing more is written: bring the run's folder back as it was, then trainer resume")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::testing::{config, file_store, memory_store},
        ids::{RunId, WorldSize},
        journal::{Formed, FormedReason, Gone, Journal, RosterEntry, Succession},
    };

    async fn journal(store: &Store) -> JournalWriter {
        let run_id = RunId::new("run").unwrap();
        JournalWriter::start(Journal::create(store.clone(), NodeId::random(), run_id, config()).await.unwrap())
    }

    #[tokio::test]
    async fn a_journal_whose_newest_record_is_gone_ends_the_run() {
        let store = memory_store();
        let journal = journal(&store).await;
        assert!(look(&journal, &store, &me(), Generation(0)).await.unwrap().is_none());
        store.delete(&layout::journal_entry(0)).await.unwrap();
        let end = look(&journal, &store, &me(), Generation(0)).await.unwrap().expect("nothing is there any more");
        assert_eq!(end.kind(), Kind::Unavailable);
        assert!(end.to_string().contains("00000000.json is gone"), "{end}");
    }

    #[tokio::test]
    async fn a_run_whose_journal_nobody_writes_ends() {
        let store = memory_store();
        let run_id = RunId::new("run").unwrap();
        let journal = Journal::create(store.clone(), NodeId::random(), run_id, config()).await.unwrap();
        let end = look_once(&JournalWriter::without_task(&journal), &store, &me(), Generation(0))
            .await
            .expect("nothing can be committed");
        assert_eq!((end.kind(), &*end.to_string()), (Kind::Bug, "the task that writes the journal has ended"));
    }

    #[tokio::test]
    async fn a_folder_that_is_no_longer_there_is_named_as_the_cause() {
        let (folder, store) = file_store();
        let journal = journal(&store).await;
        let _held = store.hold().await.unwrap();
        assert!(look(&journal, &store, &me(), Generation(0)).await.unwrap().is_none());
        std::fs::rename(folder.path().join("run"), folder.path().join("elsewhere")).unwrap();
        let end = look(&journal, &store, &me(), Generation(0)).await.unwrap().expect("it was moved");
        assert_eq!(end.kind(), Kind::Unavailable);
        assert!(end.to_string().contains("is no longer the folder"), "{end}");
    }

    fn me() -> NodeId {
        NodeId::new("me").unwrap()
    }

    /// Node `leader` forms the next generation with these others.
    async fn group(store: &Store, leader: &str, others: &[&str], succession: Succession) -> Generation {
        let node = |name: &str| NodeId::new(name).unwrap();
        let mut journal = Journal::open(store.clone(), node(leader), RunId::new("run").unwrap()).await.unwrap();
        let names = std::iter::once(&leader).chain(others);
        let roster: Vec<_> = names.map(|name| RosterEntry::new(node(name), 1)).collect();
        let formed = Formed {
            world_size: WorldSize(u32::try_from(roster.len()).unwrap()),
            roster,
            resume: None,
            overrides: Vec::new(),
            reason: FormedReason::NodeLost,
            data: None,
            succession,
        };
        journal.form(formed).await.unwrap()
    }

    #[tokio::test]
    async fn a_follower_is_at_home_until_a_generation_leaves_it_out() {
        let store = memory_store();
        let journal = journal(&store).await;
        let first = group(&store, "leader", &["me"], Succession::default()).await;
        assert!(look(&journal, &store, &me(), first).await.unwrap().is_none(), "it has formed none itself");
        let stranger = NodeId::new("stranger").unwrap();
        assert!(look(&journal, &store, &stranger, Generation(0)).await.unwrap().is_some());
        // The next generation names it: it goes on there.
        let joined = vec![NodeId::new("new").unwrap()];
        let grown = Succession { continues: Some(first), gone: Vec::new(), joined, why: None };
        let second = group(&store, "leader", &["me", "new"], grown).await;
        assert!(look(&journal, &store, &me(), first).await.unwrap().is_none());
        let gone = vec![Gone { node: me(), why: "it was asleep".into() }];
        group(&store, "leader", &["new"], Succession { continues: Some(second), gone, joined: Vec::new(), why: None })
            .await;
        let end = look(&journal, &store, &me(), second).await.unwrap().expect("it is left out");
        assert_eq!(end.kind(), Kind::Fenced);
        assert!(end.to_string().contains("left out") && end.to_string().contains("it was asleep"), "{end}");
        let end = look(&journal, &store, &stranger, second).await.unwrap().expect("it is fenced");
        assert!(end.to_string().starts_with("fenced"), "{end}");
    }
}
