//! The one task that owns a run's journal while an agent lives.
//!
//! Every other task holds a [`JournalWriter`]: it sends commands, each with its [`Urgency`], and reads the newest
//! [`View`] without waiting. An append may hang in the store for many seconds, and a notice leaves few; so the task
//! interrupts a notice, housekeeping or a look as soon as something more urgent arrives, and restarts it afterwards.
//!
//! # Owns
//! The [`Journal`], the queue of commands, the order in which they run.
//!
//! # Does not own
//! The rules of appending ([`super::admit`](fn@super::admit)), the decision what to write, and how long a caller waits:
//! a caller that drops its future withdraws its command.
//!
//! # Invariants
//! - One command at a time touches the journal.
//! - The view shows a command's outcome before its caller receives the answer.
//! - A conditional append ([`append_if`](JournalWriter::append_if)) checks its condition each time it begins.
//!
//! # Crash, retry, cancel
//! Nothing is stored here. A panic ends the task, and the answer to every later command is [`JournalError::NoWriter`]:
//! the process can commit nothing more, so its generation ends. An interrupted or withdrawn append may stand all the
//! same: the journal remembers each one's attempt, so that the same record is not written twice, whatever came between.
//! A commit of unknown fate is [`View::doubtful`] until it is found to stand, or until the last words, which try it a
//! last time.

use std::time::Duration;

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use super::{Basis, Committed, Formed, Journal, JournalError, Record, RunState};
use crate::ids::Generation;

/// How long each of the first attempts at an urgent record may take. Records are small, and a machine's last seconds
/// may be passing.
const PATIENCE: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(4), Duration::from_secs(8)];
/// How long the second attempt at a commit of unknown fate may take. The last words follow it, before a deadline.
const AGAIN: Duration = Duration::from_millis(500);

/// Which command runs first; the most urgent is listed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// A checkpoint whose data is durable.
    Commit,
    /// How the generation or the run ends.
    LastWords,
    /// A new generation, and everything that must be known before it.
    Formed,
    /// A notice was received.
    Notice,
    /// `pruned` and `damaged`.
    Housekeeping,
    /// A search for newer records that no caller waits for.
    Look,
}

impl Urgency {
    /// Whether a running command is interrupted when one of urgency `other` arrives.
    fn gives_way_to(self, other: Self) -> bool {
        self >= Self::Notice && other < self
    }
}

/// The known state of the journal.
#[derive(Clone, Debug)]
pub struct View {
    /// The run as of the last record read. A copy is cheap.
    pub state: RunState,
    /// The newest generation that this node has formed.
    pub held: Option<Generation>,
    /// The commit begun last, if it is not known to stand.
    pub doubtful: Option<Committed>,
}

impl View {
    fn of(journal: &Journal) -> Self {
        Self { state: journal.state().clone(), held: journal.held(), doubtful: journal.doubtful().cloned() }
    }
}

type Wanted = Box<dyn Fn(&RunState) -> bool + Send + Sync>;
type Make = Box<dyn Fn(&RunState) -> Record + Send + Sync>;

/// Work on the journal.
enum Work {
    /// Appends a record as long as the state wants it.
    Append {
        record: Record,
        wanted: Wanted,
    },
    /// Settles a doubtful commit, then appends a record computed from the state.
    LastWords(Make),
    Form(Formed),
    FormUpon(Formed, Basis),
    Refresh,
}

/// The number of the record or of the generation, or the number of records read. `None`: the record is not wanted, or
/// more urgent work interrupted a search.
type Answer = Result<Option<u64>, JournalError>;

struct Command {
    urgency: Urgency,
    work: Work,
    answer: oneshot::Sender<Answer>,
}

/// A handle to the task that owns a run's journal.
#[derive(Clone, Debug)]
pub struct JournalWriter {
    commands: mpsc::UnboundedSender<Command>,
    view: watch::Receiver<View>,
}

impl JournalWriter {
    /// Starts the task, which ends when the last handle is dropped. Call it within a tokio runtime.
    pub fn start(journal: Journal) -> Self {
        let (commands, received) = mpsc::unbounded_channel();
        let (shown, view) = watch::channel(View::of(&journal));
        tokio::spawn(Task { journal, received, queue: Vec::new(), shown }.run());
        Self { commands, view }
    }

    /// A handle whose task has ended, as one does that panics.
    #[cfg(test)]
    pub(crate) fn without_task(journal: &Journal) -> Self {
        Self { commands: mpsc::unbounded_channel().0, view: watch::channel(View::of(journal)).1 }
    }

    /// The current knowledge.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// The run as of the last record read.
    pub fn state(&self) -> RunState {
        self.view.borrow().state.clone()
    }

    async fn ask(&self, urgency: Urgency, work: Work) -> Answer {
        let (answer, answered) = oneshot::channel();
        // The task outlives its handles; if it panicked, its answer never comes.
        let _ = self.commands.send(Command { urgency, work, answer });
        answered.await.unwrap_or(Err(JournalError::NoWriter))
    }

    /// Appends a record at once; returns its number. If the store does not answer, the request is soon repeated.
    pub async fn append(&self, urgency: Urgency, record: Record) -> Result<u64, JournalError> {
        let wanted = Box::new(|_: &RunState| true);
        self.ask(urgency, Work::Append { record, wanted }).await.map(Option::unwrap_or_default)
    }

    /// Appends a record if the state `wants` it when its turn comes; returns its number.
    pub async fn append_if(
        &self,
        urgency: Urgency,
        record: Record,
        wanted: impl Fn(&RunState) -> bool + Send + Sync + 'static,
    ) -> Result<Option<u64>, JournalError> {
        self.ask(urgency, Work::Append { record, wanted: Box::new(wanted) }).await
    }

    /// Settles the fate of a doubtful commit, then appends the record that `make` builds from the state; returns its
    /// number.
    pub async fn last_words(
        &self,
        make: impl Fn(&RunState) -> Record + Send + Sync + 'static,
    ) -> Result<u64, JournalError> {
        self.ask(Urgency::LastWords, Work::LastWords(Box::new(make))).await.map(Option::unwrap_or_default)
    }

    /// Forms the next generation; see [`Journal::form`].
    pub async fn form(&self, formed: Formed) -> Result<Generation, JournalError> {
        self.ask(Urgency::Formed, Work::Form(formed)).await.map(|number| Generation(number.unwrap_or_default()))
    }

    /// The same from a state that may be an old one by now; see [`Journal::form_upon`].
    pub async fn form_upon(&self, formed: Formed, basis: Basis) -> Result<Generation, JournalError> {
        let number = self.ask(Urgency::Formed, Work::FormUpon(formed, basis)).await;
        number.map(|number| Generation(number.unwrap_or_default()))
    }

    /// Reads on to the end; returns the number of new records.
    pub async fn refresh(&self) -> Result<u64, JournalError> {
        self.ask(Urgency::Formed, Work::Refresh).await.map(Option::unwrap_or_default)
    }

    /// Reads on if there is nothing else to do; `None`: there is other work, which will itself find any new records.
    pub async fn look(&self) -> Result<Option<View>, JournalError> {
        let read = self.ask(Urgency::Look, Work::Refresh).await?;
        Ok(read.map(|_| self.view()))
    }
}

struct Task {
    journal: Journal,
    received: mpsc::UnboundedReceiver<Command>,
    /// The most urgent last; of one urgency, the first to come last.
    queue: Vec<Command>,
    shown: watch::Sender<View>,
}

/// How the work on a command ended.
enum Ended {
    Answered(Answer),
    /// Its caller no longer waits.
    Withdrawn,
    /// Something more urgent has arrived.
    Interrupted,
}

impl Task {
    async fn run(mut self) {
        loop {
            while let Ok(command) = self.received.try_recv() {
                enqueue(&mut self.queue, command);
            }
            let Some(command) = self.queue.pop() else {
                let Some(command) = self.received.recv().await else { return };
                enqueue(&mut self.queue, command);
                continue;
            };
            self.serve(command).await;
        }
    }

    async fn serve(&mut self, mut command: Command) {
        if command.answer.is_closed() {
            return;
        }
        let ended = {
            let Self { journal, received, queue, .. } = self;
            let work = perform(journal, command.urgency, &command.work);
            tokio::pin!(work);
            loop {
                tokio::select! {
                    biased;
                    Some(other) = received.recv() => {
                        let interrupts = command.urgency.gives_way_to(other.urgency);
                        if other.urgency == Urgency::Look {
                            let _ = other.answer.send(Ok(None));
                        } else {
                            enqueue(queue, other);
                        }
                        if interrupts {
                            break Ended::Interrupted;
                        }
                    }
                    () = command.answer.closed() => break Ended::Withdrawn,
                    answer = &mut work => break Ended::Answered(answer),
                }
            }
        };
        self.shown.send_replace(View::of(&self.journal));
        match ended {
            Ended::Answered(answer) => drop(command.answer.send(answer)),
            Ended::Interrupted if command.urgency == Urgency::Look => drop(command.answer.send(Ok(None))),
            // It is again the first of its urgency.
            Ended::Interrupted => {
                let place = self.queue.partition_point(|other| other.urgency >= command.urgency);
                self.queue.insert(place, command);
            }
            Ended::Withdrawn => {}
        }
    }
}

fn enqueue(queue: &mut Vec<Command>, command: Command) {
    let place = queue.partition_point(|other| other.urgency > command.urgency);
    queue.insert(place, command);
}

async fn perform(journal: &mut Journal, urgency: Urgency, work: &Work) -> Answer {
    if let Work::LastWords(_) = work {
        settle_doubt(journal).await;
    }
    // The same record again settles the attempt before.
    if urgency <= Urgency::LastWords {
        for patience in PATIENCE {
            if let Ok(answer) = timeout(patience, attempt(journal, work)).await {
                return answer;
            }
            tracing::info!("the store does not answer: the journal's record is sent again");
        }
    }
    attempt(journal, work).await
}

async fn attempt(journal: &mut Journal, work: &Work) -> Answer {
    match work {
        Work::Append { record, wanted } => {
            if !wanted(journal.state()) {
                return Ok(None);
            }
            match journal.append(record.clone()).await {
                // An earlier attempt was found in the store.
                Err(JournalError::Refused { .. }) if !wanted(journal.state()) => Ok(None),
                other => other.map(Some),
            }
        }
        Work::LastWords(make) => journal.append_made(make).await.map(Some),
        Work::Form(formed) => journal.form(formed.clone()).await.map(|generation| Some(generation.get())),
        Work::FormUpon(formed, basis) => {
            journal.form_upon(formed.clone(), basis).await.map(|generation| Some(generation.get()))
        }
        Work::Refresh => journal.refresh().await.map(Some),
    }
}

/// Tries once more to write a commit of unknown fate: its data is durable.
async fn settle_doubt(journal: &mut Journal) {
    let Some(committed) = journal.doubtful().cloned() else { return };
    let step = committed.step;
    match timeout(AGAIN, journal.append(Record::Committed(committed))).await {
        Ok(Ok(_)) => tracing::info!(%step, "the second attempt wrote the record of the last save"),
        Ok(Err(error)) => tracing::warn!(%error, %step, "the record of the last save was not written"),
        Err(_) => tracing::warn!(%step, "the record of the last save was not written: the store does not answer"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use super::*;
    use crate::{
        checkpoint::testing::{STORAGE, checkpoint, config},
        ids::{Generation, NodeId, RunId, Step, WorldSize},
        journal::{CheckpointStatus, FormedReason, RosterEntry, Succession},
        layout,
        storage::{
            Store,
            faulty::{Fault, Faulty},
        },
    };

    /// What takes longer hangs, and its test fails: no test here waits for the store for more than milliseconds, but
    /// for the patience with a commit.
    const LIMIT: Duration = Duration::from_secs(20);

    async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
        match timeout(LIMIT, work).await {
            Ok(done) => done,
            Err(_) => panic!("{what}: not within {LIMIT:?}"),
        }
    }

    /// A journal whose generation 1 has committed steps 1 and 2, on a store whose creates hang once `hangs` says so;
    /// the next one sets it back.
    async fn writer(fault: Fault) -> (JournalWriter, Store, Arc<AtomicBool>) {
        let hangs = Arc::new(AtomicBool::new(false));
        let faulty = Faulty::new({
            let hangs = Arc::clone(&hangs);
            move |operation, path, _| {
                let append = operation == "create" && path.contains(layout::JOURNAL);
                if append && hangs.swap(false, Ordering::SeqCst) { fault } else { Fault::Pass }
            }
        });
        let store = Store::faulty_with(&faulty, &STORAGE, Some(Duration::MAX));
        let (node, run_id) = (NodeId::random(), RunId::new("run").unwrap());
        let mut journal = Journal::create(store.clone(), node.clone(), run_id, config()).await.unwrap();
        let formed = Formed {
            roster: vec![RosterEntry::new(node, 1)],
            world_size: WorldSize(1),
            resume: None,
            overrides: Vec::new(),
            reason: FormedReason::Started,
            data: None,
            succession: Succession::default(),
        };
        journal.form(formed).await.unwrap();
        for step in 1..=2 {
            let (committed, _) = checkpoint(&store, step, 1, 1, step).await;
            journal.append(Record::Committed(committed)).await.unwrap();
        }
        (JournalWriter::start(journal), store, hangs)
    }

    fn status(state: &RunState) -> CheckpointStatus {
        state.checkpoint(Step(1), Generation(1)).unwrap().status.clone()
    }

    fn good(state: &RunState) -> bool {
        status(state) == CheckpointStatus::Good
    }

    const PRUNED: Record = Record::Pruned { step: Step(1), generation: Generation(1) };

    async fn hanging(hangs: &AtomicBool) {
        let begun = async {
            while hangs.load(Ordering::SeqCst) {
                tokio::task::yield_now().await;
            }
        };
        within("the append reaches the store", begun).await;
    }

    fn prune(journal: &JournalWriter) -> tokio::task::JoinHandle<Answer> {
        let journal = journal.clone();
        tokio::spawn(async move { journal.append_if(Urgency::Housekeeping, PRUNED, good).await })
    }

    #[test]
    fn only_work_that_can_wait_gives_way_and_only_to_more_urgent_work() {
        use Urgency::{Commit, Formed, Housekeeping, LastWords, Look, Notice};
        let all = [Commit, LastWords, Formed, Notice, Housekeeping, Look];
        for (place, urgency) in all.into_iter().enumerate() {
            let first: Vec<_> = all.into_iter().filter(|other| urgency.gives_way_to(*other)).collect();
            let expected = if place < 3 { &[][..] } else { &all[..place] };
            assert_eq!(first, expected, "{urgency:?}");
        }
    }

    /// Housekeeping hangs in the store; a commit comes and runs next; the housekeeping runs after it, once.
    async fn gives_way(fault: Fault, numbers: (u64, u64)) {
        let (journal, store, hangs) = writer(fault).await;
        hangs.store(true, Ordering::SeqCst);
        let pruning = prune(&journal);
        hanging(&hangs).await;
        let (committed, _) = checkpoint(&store, 3, 1, 1, 3).await;
        let commit = journal.append(Urgency::Commit, Record::Committed(committed));
        let number = within("the commit", commit).await.unwrap();
        let pruned = within("the housekeeping after it", pruning).await.unwrap().unwrap();
        assert_eq!(number, numbers.0);
        // If the interrupted append had landed, it is not written twice.
        assert_eq!(pruned, (numbers.1 > numbers.0).then_some(numbers.1));
        let state = journal.state();
        assert_eq!((state.next(), status(&state)), (6, CheckpointStatus::Pruned));
    }

    #[tokio::test]
    async fn a_commit_interrupts_housekeeping_that_hangs() {
        gives_way(Fault::Hang, (4, 5)).await;
    }

    #[tokio::test]
    async fn an_interrupted_append_that_stands_is_not_written_twice() {
        gives_way(Fault::LandsAndHangs, (5, 4)).await;
    }

    #[test]
    fn waiting_commands_run_by_urgency_then_in_order() {
        let command = |urgency, number| {
            let record = Record::Pruned { step: Step(number), generation: Generation(1) };
            let work = Work::Append { record, wanted: Box::new(|_| true) };
            Command { urgency, work, answer: oneshot::channel().0 }
        };
        let mut queue = Vec::new();
        for (urgency, number) in [
            (Urgency::Housekeeping, 1),
            (Urgency::Notice, 2),
            (Urgency::Commit, 3),
            (Urgency::Notice, 4),
            (Urgency::Housekeeping, 5),
            (Urgency::LastWords, 6),
        ] {
            enqueue(&mut queue, command(urgency, number));
        }
        let mut served = Vec::new();
        while let Some(Command { work: Work::Append { record: Record::Pruned { step, .. }, .. }, .. }) = queue.pop() {
            served.push(step.get());
        }
        assert_eq!(served, [3, 6, 2, 4, 1, 5]);
    }

    #[tokio::test]
    async fn a_search_gives_up_if_there_is_other_work() {
        let (journal, store, hangs) = writer(Fault::Hang).await;
        let seen = within("a look", journal.look()).await.unwrap().expect("nothing else is to be done");
        assert_eq!(seen.state.next(), 4);
        hangs.store(true, Ordering::SeqCst);
        let pruning = prune(&journal);
        hanging(&hangs).await;
        assert!(within("a look beside an append", journal.look()).await.unwrap().is_none());
        pruning.abort();
        let (committed, _) = checkpoint(&store, 3, 1, 1, 3).await;
        let commit = journal.append(Urgency::Commit, Record::Committed(committed));
        assert_eq!(within("a commit", commit).await.unwrap(), 4);
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_takes_its_command_back() {
        let (journal, _, hangs) = writer(Fault::Hang).await;
        hangs.store(true, Ordering::SeqCst);
        let pruning = prune(&journal);
        hanging(&hangs).await;
        // Of one urgency: it waits behind the one that hangs.
        let waiting = prune(&journal);
        waiting.abort();
        assert!(waiting.await.is_err());
        pruning.abort();
        assert!(pruning.await.is_err());
        let again = journal.append_if(Urgency::Housekeeping, PRUNED, good);
        assert_eq!(within("an append behind two withdrawn ones", again).await.unwrap(), Some(4));
        assert_eq!(journal.state().next(), 5);
    }

    #[tokio::test]
    async fn a_record_that_is_not_wanted_is_not_written() {
        let (journal, ..) = writer(Fault::Pass).await;
        let never = journal.append_if(Urgency::Housekeeping, PRUNED, |_| false);
        let never = within("an append that is not wanted", never).await.unwrap();
        assert_eq!((never, journal.state().next()), (None, 4));
    }

    #[tokio::test]
    async fn the_view_shows_every_answered_command() {
        let (journal, store, _) = writer(Fault::Pass).await;
        assert_eq!(journal.view().held, Some(Generation(1)));
        let (committed, _) = checkpoint(&store, 3, 1, 1, 3).await;
        let commit = journal.append(Urgency::Commit, Record::Committed(committed));
        within("a commit", commit).await.unwrap();
        assert_eq!(journal.state().newest().map(|newest| newest.committed.step), Some(Step(3)));
    }

    /// What `interrupted` says of a run that was stopped after step 3.
    fn interruption(state: &RunState) -> Record {
        let newest = state.newest().map(|newest| newest.committed.step);
        Record::Interrupted {
            generation: Generation(1),
            step: Step(3),
            committed: newest,
            lost_steps: 3 - newest.unwrap_or_default().get(),
            verdict: "the time was up".into(),
            drain: None,
            cap: None,
        }
    }

    fn notice() -> Record {
        let (source, means) = ("aws-spot".into(), crate::journal::Means::Interruption);
        Record::Notice { generation: Generation(1), source, deadline_s: Some(120.0), means }
    }

    fn commit(journal: &JournalWriter, committed: &Committed) -> tokio::task::JoinHandle<Result<u64, JournalError>> {
        let (journal, committed) = (journal.clone(), committed.clone());
        tokio::spawn(async move { journal.append(Urgency::Commit, Record::Committed(committed)).await })
    }

    /// A commit hangs and its caller gives up; a notice takes its number, or the one after it.
    #[tokio::test]
    async fn a_commit_of_unknown_fate_is_tried_again_after_a_notice() {
        for fault in [Fault::Hang, Fault::LandsAndHangs] {
            let (journal, store, hangs) = writer(fault).await;
            let (committed, _) = checkpoint(&store, 3, 1, 1, 3).await;
            hangs.store(true, Ordering::SeqCst);
            let commit = commit(&journal, &committed);
            hanging(&hangs).await;
            let noting = tokio::spawn({
                let journal = journal.clone();
                async move { journal.append_if(Urgency::Notice, notice(), |_| true).await }
            });
            commit.abort();
            let noted = timeout(LIMIT, noting).await.expect("it waits").unwrap().unwrap();
            assert_eq!(noted, Some(if fault == Fault::Hang { 4 } else { 5 }), "{fault:?}");
            timeout(LIMIT, journal.last_words(interruption)).await.expect("they wait").unwrap();
            let view = journal.view();
            let said = &view.state.interruptions()[0];
            assert_eq!((said.committed, said.lost_steps), (Some(Step(3)), 0), "{fault:?}");
            assert_eq!((view.state.next(), view.doubtful), (7, None), "{fault:?}");
        }
    }

    /// A commit comes while the record of a notice hangs, which stands.
    #[tokio::test]
    async fn a_notice_that_stands_is_not_written_twice() {
        let (journal, store, hangs) = writer(Fault::LandsAndHangs).await;
        let (committed, _) = checkpoint(&store, 3, 1, 1, 3).await;
        hangs.store(true, Ordering::SeqCst);
        let noting = tokio::spawn({
            let journal = journal.clone();
            async move { journal.append_if(Urgency::Notice, notice(), |_| true).await }
        });
        hanging(&hangs).await;
        assert_eq!(timeout(LIMIT, commit(&journal, &committed)).await.expect("it waits").unwrap().unwrap(), 5);
        assert_eq!(timeout(LIMIT, noting).await.expect("it was forgotten").unwrap().unwrap(), Some(4));
        let state = journal.state();
        assert_eq!((state.next(), state.notices().len()), (6, 1));
    }

    /// A verdict whose answer was lost stands; after another one on the same checkpoint it is a new verdict.
    #[tokio::test]
    async fn an_older_verdict_that_stands_is_not_taken_for_a_new_one() {
        let (journal, _, hangs) = writer(Fault::LandsAndHangs).await;
        let (step, generation) = (Step(1), Generation(1));
        let damaged = || Record::Damaged { step, generation, reason: "it is short".into() };
        hangs.store(true, Ordering::SeqCst);
        let judging = tokio::spawn({
            let (journal, damaged) = (journal.clone(), damaged());
            async move { journal.append(Urgency::Housekeeping, damaged).await }
        });
        hanging(&hangs).await;
        judging.abort();
        let cleared = journal.append(Urgency::Housekeeping, Record::Cleared { step, generation }).await;
        assert_eq!(cleared.unwrap(), 5);
        // It was read whole, so the rules protect it.
        let again = journal.append(Urgency::Housekeeping, damaged()).await;
        assert!(matches!(again, Err(JournalError::Refused { .. })), "{again:?}");
    }

    /// The commit's answer is lost, its caller gives up, and it stands: before the last words begin, or only after.
    #[tokio::test]
    async fn last_words_count_a_commit_of_unknown_fate() {
        for fault in [Fault::LandsAndHangs, Fault::Hang] {
            let (journal, store, hangs) = writer(fault).await;
            let (committed, _) = checkpoint(&store, 3, 1, 1, 3).await;
            hangs.store(true, Ordering::SeqCst);
            let commit = commit(&journal, &committed);
            hanging(&hangs).await;
            commit.abort();
            timeout(LIMIT, journal.last_words(interruption)).await.expect("they wait").unwrap();
            let view = journal.view();
            let said = &view.state.interruptions()[0];
            assert_eq!((said.lost_steps, said.committed), (0, Some(Step(3))), "{fault:?}");
            assert_eq!((view.state.next(), view.doubtful), (6, None), "{fault:?}");
        }
    }
}
