//! Keeps a message hidden while its run trains.
//!
//! A message is hidden for one lease at a time, and the lease is renewed when a third of it is over, so that two
//! requests in a row may fail. Twelve hours after its receive SQS hides it no longer. Before that it is handed over: a
//! copy is sent, then the old one deleted (see [`super::handover`]), and training continues without a message. An idle
//! consumer that receives the copy sees by the run's heartbeat that it is alive and puts the copy back for a while;
//! when the machine goes away, the copy brings the run to the next one.
//!
//! *Crash*: the lease runs out and the message is seen again. *Cancel*: [`Holder::stop`] lets a request under way end
//! first, so that this process never cuts a hand-over in two.

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
    /// The length of one lease: how long it takes until others see a killed consumer's job.
    pub lease: Duration,
    /// The longest holding time, before whose end it is handed over.
    pub longest: Duration,
}

/// The action that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Another lease.
    Extend,
    /// A hand-over: the total is nearly used up.
    HandOver,
}

impl Terms {
    /// The action due when a message was held for `held`. SQS refuses an extension that would end beyond the total, so
    /// there is no such request; the hand-over comes while the lease before it still runs.
    pub fn due(self, held: Duration) -> Due {
        if held.saturating_add(self.lease) <= self.longest { Due::Extend } else { Due::HandOver }
    }

    /// The interval between two requests.
    pub fn interval(self) -> Duration {
        self.lease / 3
    }
}

/// The holder of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Ours.
    Ours,
    /// Its lease ran out, or it was deleted: another consumer may have it.
    Lost,
    /// No longer ours, by choice: a copy is in the queue.
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
    /// Starts holding `message`, on the runtime of the caller. A copy carries the value of `carried` when it is sent;
    /// `handed_over` is called when the total forces a hand-over.
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

    /// Stops holding, after a request that is under way; returns whose the message is now.
    pub async fn stop(self) -> Hold {
        let _ = self.stop.send(true);
        let _ = self.task.await;
        *lock(&self.hold)
    }
}

/// A panic in another thread leaves a whole value behind: nothing here is changed in two steps.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn extend(queue: &Queue, message: &Message, lease: Duration) -> Hold {
    match queue.hide(message, lease).await {
        Ok(Held::Yes) => Hold::Ours,
        Ok(Held::Gone) => {
            tracing::warn!(
                "this consumer no longer holds its message; the run's journal keeps other consumers from writing"
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
        // The message itself is still there and becomes visible when its lease ends.
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
