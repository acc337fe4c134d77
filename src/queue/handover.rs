//! Pure decisions: the treatment of a message before its run is trained, and after.
//!
//! A queue counts receives and moves away a message that was received too often. That is meant for jobs that break
//! their consumers; a machine that is reclaimed ten times has broken nothing. SQS can't undo a receive, so a message
//! that is handed over by choice is *renewed*: a fresh copy is sent, whose receives count from 0, and the old one is
//! deleted, in this order.
//!
//! | killed here | left over | result |
//! |---|---|---|
//! | before the send | the old message, hidden until its lease ends | received again, one receive more |
//! | between send and delete | both | one consumer trains, the other finds the run alive or completed; the journal fences |
//! | after the delete | the copy | as intended |
//!
//! A job whose store or data do not answer may be as broken as one that fails: its receives count, too, unless its run
//! got further on this consumer. Only if the consumer's own store does not answer either is the fault here: the message
//! is renewed and the consumer exits.
//!
//! The same holds for failures. A machine with a broken GPU, or a role that has lost its write permission, would fail
//! one healthy job after the other into the dead-letter queue. So if the consumer's own store refuses, or if a second
//! run in a row ends with a fault of this program with no checkpoint in between ([`Suspicion`]), the message is renewed
//! and the consumer exits with that exit code. Other kinds of failure raise no suspicion: a job may name places that
//! this consumer's role can't read. The first of the two has counted; and if both jobs are poison themselves, the
//! second is renewed, at the cost of a consumer.
//!
//! So a kill counts as a receive, since no consumer was left to renew the message. The next receiver of the message
//! makes up for it: if the run's journal shows a checkpoint that was not there when the copy was sent, the job is no
//! poison, and its message is renewed before it is trained. A job that is killed again and again without a checkpoint
//! in between ends in the dead-letter queue, as it should.
//!
//! Attributes that a copy carries: `trainer-interruptions`, how often its run was handed over because its machine went
//! away, and `trainer-step`, the newest committed step at that moment. Both are only counts; a wrong one misleads a
//! report, or costs a receive.

use std::time::Duration;

use super::lease::Hold;
use crate::{cloud::sqs::LONGEST_DELAY, error::Kind, ids::RunId};

/// The attribute that counts interruptions.
pub const INTERRUPTIONS: &str = "trainer-interruptions";
/// The attribute with the newest committed step.
pub const STEP: &str = "trainer-step";

/// The counts that a message carries along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// How often its run was handed over because its machine went away.
    pub interruptions: u64,
    /// The newest committed step when it was sent.
    pub step: u64,
}

impl Carried {
    /// As attributes.
    pub const fn numbers(self) -> [(&'static str, u64); 2] {
        [(INTERRUPTIONS, self.interruptions), (STEP, self.step)]
    }
}

/// Whether a message that was received more than once is renewed before it is trained: its run has progressed since it
/// was sent, so its earlier receivers did their work.
pub const fn made_progress(received: u32, carried: Carried, committed: u64) -> bool {
    received > 1 && committed > carried.step
}

/// How a job's turn on this consumer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The run is complete.
    Completed,
    /// The machine goes away, or this consumer was asked to stop.
    Interrupted,
    /// Another live consumer has the run.
    Elsewhere,
    /// The run has progressed since the message was sent: it is renewed before it is trained.
    Further,
    /// Something that the job needs does not answer.
    Unreachable,
    /// The fault is this consumer's own, as far as can be determined: its store does not answer or refuses, or several
    /// runs in a row fail. No job can be trained here.
    CutOff,
    /// It needs a person, or another machine.
    Failed,
    /// Its run has reached a cap. A person may raise that, and send the job again; this message is done.
    Capped,
    /// The message can't be understood, here or anywhere.
    Unintelligible,
}

impl End {
    /// From the error with which a run ended.
    pub const fn of_error(kind: Kind) -> Self {
        match kind {
            Kind::Fenced => Self::Elsewhere,
            Kind::Unavailable => Self::Unreachable,
            Kind::Interrupted | Kind::InterruptedWithLoss => Self::Interrupted,
            Kind::Usage | Kind::Data | Kind::Bug | Kind::Permission | Kind::Config | Kind::Fruitless => Self::Failed,
            Kind::Capped => Self::Capped,
        }
    }
}

/// Whether failures on this consumer are its own fault.
#[derive(Clone, Debug, Default)]
pub struct Suspicion {
    /// This run has failed here, and none has committed a step since.
    failed: Option<RunId>,
}

impl Suspicion {
    /// A run has ended here, with an error of the kind `error`, if any; `further`: it has committed a step. Returns
    /// whether this consumer is at fault.
    pub fn is_confirmed_by(&mut self, run: &RunId, error: Option<Kind>, further: bool) -> bool {
        if further {
            self.failed = None;
        }
        // Lack of permission may be the job's: it may name places that this consumer's role can't read. Whether the
        // consumer's own store refuses is checked.
        if error != Some(Kind::Bug) {
            return false;
        }
        let confirmed = self.failed.as_ref().is_some_and(|before| before != run);
        // A run that fails after a checkpoint has shown that this machine can train.
        if !further {
            self.failed = Some(run.clone());
        }
        confirmed
    }
}

/// The treatment of the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settle {
    /// It is deleted.
    Delete,
    /// A copy is sent that may be received after `delay`, then it is deleted.
    Renew {
        /// Until the copy is seen.
        delay: Duration,
        /// Whether this counts as an interruption.
        interrupted: bool,
    },
    /// It becomes visible again after this time, and the receive counts.
    Return(Duration),
    /// None: it is no longer ours.
    Leave,
}

/// The treatment of a message that was received `received` times, whose lease is `lease` long. `further`: its run has
/// committed a step on this consumer.
pub fn settle(end: End, hold: Hold, received: u32, further: bool, dead_letters: bool, lease: Duration) -> Settle {
    match (end, hold) {
        // A message that another consumer holds by now is not duplicated; deleting it by an old receipt does nothing,
        // or the right thing.
        (End::Completed | End::Capped, _) => Settle::Delete,
        (_, Hold::Lost | Hold::HandedOver) => Settle::Leave,
        (End::Interrupted, Hold::Ours) => Settle::Renew { delay: Duration::ZERO, interrupted: true },
        (End::Further, Hold::Ours) => Settle::Renew { delay: Duration::ZERO, interrupted: false },
        (End::Elsewhere, Hold::Ours) => Settle::Renew { delay: lease.min(LONGEST_DELAY), interrupted: false },
        (End::CutOff, Hold::Ours) => Settle::Renew { delay: lease.min(LONGEST_DELAY), interrupted: true },
        (End::Unreachable, Hold::Ours) if further => {
            Settle::Renew { delay: lease.min(LONGEST_DELAY), interrupted: false }
        }
        (End::Unreachable, Hold::Ours) => Settle::Return(lease),
        // With a dead-letter queue it is soon there; without one this consumer would do nothing else.
        (End::Unintelligible, Hold::Ours) if dead_letters => Settle::Return(Duration::ZERO),
        (End::Failed | End::Unintelligible, Hold::Ours) => Settle::Return(pause(received, lease)),
    }
}

/// The pause before a failed job is tried again: a tenth of the lease, doubled with each receive, up to three leases.
fn pause(received: u32, lease: Duration) -> Duration {
    let doublings = received.saturating_sub(1).min(16);
    (lease / 10).saturating_mul(1 << doublings).clamp(Duration::from_secs(1), lease * 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(300);

    #[test]
    fn only_what_failed_counts_towards_the_dead_letter_queue() {
        let renew = |seconds, interrupted| Settle::Renew { delay: Duration::from_secs(seconds), interrupted };
        let back = |seconds| Settle::Return(Duration::from_secs(seconds));
        for (end, received, dead_letters, expected) in [
            (End::Completed, 1, true, Settle::Delete),
            (End::Capped, 1, true, Settle::Delete),
            (End::Interrupted, 1, true, renew(0, true)),
            (End::Interrupted, 9, false, renew(0, true)),
            (End::Elsewhere, 1, true, renew(300, false)),
            (End::Further, 2, true, renew(0, false)),
            (End::CutOff, 9, true, renew(300, true)),
            (End::Unreachable, 1, true, back(300)),
            (End::Unreachable, 9, false, back(300)),
            (End::Failed, 1, true, back(30)),
            (End::Failed, 2, true, back(60)),
            (End::Failed, 3, false, back(120)),
            (End::Failed, 4_000_000_000, false, back(900)),
            (End::Unintelligible, 1, true, back(0)),
            (End::Unintelligible, 1, false, back(30)),
        ] {
            assert_eq!(settle(end, Hold::Ours, received, false, dead_letters, LEASE), expected, "{end:?} {received}");
        }
        assert_eq!(
            settle(End::Unreachable, Hold::Ours, 2, true, true, LEASE),
            renew(300, false),
            "its run got further"
        );
        assert_eq!(settle(End::Failed, Hold::Ours, 2, true, true, LEASE), back(60), "what fails, fails");
    }

    #[test]
    fn a_message_that_is_no_longer_ours_is_never_copied() {
        for hold in [Hold::Lost, Hold::HandedOver] {
            for end in [
                End::Interrupted,
                End::Elsewhere,
                End::Further,
                End::Unreachable,
                End::CutOff,
                End::Failed,
                End::Unintelligible,
            ] {
                assert_eq!(settle(end, hold, 1, true, true, LEASE), Settle::Leave, "{end:?} {hold:?}");
            }
            assert_eq!(settle(End::Completed, hold, 1, true, true, LEASE), Settle::Delete);
        }
    }

    #[test]
    fn delays_and_pauses_stay_within_what_sqs_takes() {
        let hour = Duration::from_secs(3600);
        assert_eq!(
            settle(End::Elsewhere, Hold::Ours, 1, false, true, hour),
            Settle::Renew { delay: LONGEST_DELAY, interrupted: false }
        );
        let second = Duration::from_secs(1);
        assert_eq!(settle(End::Failed, Hold::Ours, 1, false, true, second), Settle::Return(second));
    }

    #[test]
    fn two_failed_runs_in_a_row_without_a_checkpoint_put_the_consumer_at_fault() {
        let [a, b] = ["a", "b"].map(|id| RunId::new(id).unwrap());
        let (bug, no, config) = (Some(Kind::Bug), Some(Kind::Permission), Some(Kind::Config));
        for (story, expected) in [
            (vec![(&a, bug, false), (&b, bug, false)], true),
            (vec![(&a, bug, false), (&b, no, false)], false),
            (vec![(&a, no, false), (&b, no, false)], false),
            (vec![(&a, bug, false), (&a, bug, false)], false),
            (vec![(&a, bug, false), (&a, bug, false), (&b, bug, false)], true),
            // An error in a job's configuration proves nothing about the machine, for or against.
            (vec![(&a, bug, false), (&b, config, false)], false),
            (vec![(&a, bug, false), (&b, config, false), (&b, bug, false)], true),
            (vec![(&a, no, false), (&a, bug, false), (&b, None, false), (&b, bug, false)], true),
            // A step was committed: this machine can train.
            (vec![(&a, bug, false), (&b, None, true), (&b, bug, false)], false),
            (vec![(&a, bug, false), (&b, bug, true)], false),
            (vec![(&a, bug, true), (&b, bug, false)], false),
        ] {
            let mut suspicion = Suspicion::default();
            let last =
                story.iter().map(|(run, error, further)| suspicion.is_confirmed_by(run, *error, *further)).last();
            assert_eq!(last, Some(expected), "{story:?}");
        }
    }

    #[test]
    fn a_kill_is_forgiven_if_the_run_has_progressed() {
        let carried = |step| Carried { interruptions: 0, step };
        for (received, step, committed, forgiven) in
            [(1, 0, 100, false), (2, 0, 100, true), (2, 100, 100, false), (2, 100, 101, true), (5, 0, 0, false)]
        {
            assert_eq!(made_progress(received, carried(step), committed), forgiven, "{received} {step} {committed}");
        }
    }

    #[test]
    fn every_kind_of_error_ends_a_job_in_one_way() {
        for (kind, end) in [
            (Kind::Fenced, End::Elsewhere),
            (Kind::Unavailable, End::Unreachable),
            (Kind::Bug, End::Failed),
            (Kind::Data, End::Failed),
            (Kind::Config, End::Failed),
            (Kind::Permission, End::Failed),
            (Kind::Usage, End::Failed),
            (Kind::Fruitless, End::Failed),
            (Kind::Capped, End::Capped),
        ] {
            assert_eq!(End::of_error(kind), end);
        }
    }
}
