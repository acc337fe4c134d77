//! Keeps a message hidden while its run trains.
//!
//! A message is hidden for one lease at a time, and the lease is taken anew when a third of it is over, so that two
//! requests in a row may fail. Twelve hours after its receive SQS hides it no longer. Before that it is handed over: a
//! copy is sent, then the old one deleted (see [`super::handover`]), and training goes on with no message in hand. An
//! idle consumer that receives the copy sees by the run's heartbeat that it is alive and puts the copy back for a
//! while; when the machine goes away, the copy is what brings the run to the next one.
//!
//! *Crash*: the lease runs out and the message is seen again. *Cancel*: [`Holder::stop`] lets a request that is under
//! way end first, so that a hand-over is never cut in two by this process.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, task::JoinHandle};

use super::handover::Carried;
use crate::cloud::sqs::{Held, LONGEST_DELAY, Message, Queue};

/// How long a message is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// It is hidden for so long at a time: how long it takes until a killed consumer's job is seen by others.
    pub lease: Duration,
    /// It is handed over before it was held for longer.
    pub longest: Duration,
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Another lease.
    Extend,
    /// The total is nearly used up.
    HandOver,
}

impl Terms {
    /// What is due when a message was held for `held`. An extension that would end behind the total is refused by SQS,
    /// so it is not asked for; the hand-over comes while the lease before it still runs.
    pub fn due(self, held: Duration) -> Due {
        if held.saturating_add(self.lease) <= self.longest { Due::Extend } else { Due::HandOver }
    }

    /// Between two requests.
    pub fn interval(self) -> Duration {
        self.lease / 3
    }
}

/// Whose a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Ours.
    Ours,
    /// Its lease ran out, or somebody deleted it: another consumer may have it.
    Lost,
    /// Ours no more, by choice: a copy is in the queue.
    HandedOver,
}

/// The task that holds one message.
#[derive(Debug)]
pub struct Holder {
    hold: Arc<Mutex<Hold>>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Holder {
    /// Begins to hold `message`, on the runtime of the caller. A copy carries what `carried` says when it is sent;
    /// `handed_over` hears when the total forces a hand-over.
    pub fn start(
        queue: Queue,
        message: Message,
        carried: Arc<Mutex<Carried>>,
        terms: Terms,
        handed_over: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let hold = Arc::new(Mutex::new(Hold::Ours));
        let (stop, mut stopped) = watch::channel(false);
        let task = tokio::spawn({
            let hold = Arc::clone(&hold);
            async move {
                loop {
                    tokio::select! {
                        () = tokio::time::sleep(terms.interval()) => {}
                        _ = stopped.wait_for(|stop| *stop) => return,
                    }
                    let now = match terms.due(message.since.elapsed()) {
                        Due::Extend => extend(&queue, &message, terms.lease).await,
                        Due::HandOver => {
                            let carried = *lock(&carried);
                            hand_over(&queue, &message, carried, &handed_over).await
                        }
                    };
                    *lock(&hold) = now;
                    if now != Hold::Ours {
                        return;
                    }
                }
            }
        });
        Self { hold, stop, task }
    }

    /// Ends the holding, after a request that is under way; whose the message is now.
    pub async fn stop(self) -> Hold {
        let _ = self.stop.send(true);
        let _ = self.task.await;
        *lock(&self.hold)
    }
}

/// What a thread that panicked has left behind is a whole value: nothing here is changed in two steps.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn extend(queue: &Queue, message: &Message, lease: Duration) -> Hold {
    match queue.hide(message, lease).await {
        Ok(Held::Yes) => Hold::Ours,
        Ok(Held::Gone) => {
            tracing::warn!(
                "the queue no longer knows this consumer's hold on its message; the run's journal keeps others off"
            );
            Hold::Lost
        }
        Err(error) => {
            tracing::warn!("message may become visible to others: {error}");
            Hold::Ours
        }
    }
}

async fn hand_over(queue: &Queue, message: &Message, carried: Carried, handed_over: &impl Fn()) -> Hold {
    if let Err(error) = queue.send_copy(message, &carried.numbers(), LONGEST_DELAY).await {
        // The message itself is still there and is seen again when its lease ends.
        tracing::warn!("message could not be handed over before its time is up: {error}");
        return Hold::Ours;
    }
    if let Err(error) = queue.delete(message).await {
        tracing::warn!("message was copied but not deleted, and comes twice: {error}");
    }
    handed_over();
    Hold::HandedOver
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::sqs::LONGEST_HOLD;

    #[test]
    fn a_message_is_handed_over_before_sqs_refuses_to_hide_it() {
        let terms = Terms { lease: Duration::from_secs(300), longest: LONGEST_HOLD };
        assert_eq!(terms.interval(), Duration::from_secs(100));
        let at = |seconds| terms.due(Duration::from_secs(seconds));
        assert_eq!(at(0), Due::Extend);
        assert_eq!(at(43_200 - 300), Due::Extend);
        assert_eq!(at(43_200 - 299), Due::HandOver);
        assert_eq!(at(u64::MAX), Due::HandOver);
        // Whenever the last extension was made, it still runs when the hand-over comes.
        for last in 43_200 - 400..=43_200 - 300 {
            let next = last + terms.interval().as_secs();
            assert!(at(next) == Due::Extend || next < last + 300, "{last}");
        }
    }
}
