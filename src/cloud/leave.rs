//! The effect of `on_complete.action = "terminate"`: this machine goes, and is not replaced.
//!
//! In an Auto Scaling group the group ends the machine, with its desired capacity lowered. Outside a group the machine
//! powers off. If the group does not let it go (its minimum forbids it, the permission is missing, nothing answers), it
//! stays. Powered off, it would be replaced at once by a machine that finds no work and powers off, too, and so on
//! forever. A lifecycle hook at its end would keep an idle machine waiting, and costing, until the hook's time-out:
//! this process has nothing to save, and completes it. The work is done in any case, so nothing here is an error;
//! anything that a person must do is reported.
//!
//! A container has no command that powers its machine off. `TRAINER_POWER_OFF=host` says that the host does so after
//! exit code 0: then no command is looked for.

use std::time::{Duration, Instant};

use super::{autoscaling, identity, imds::Imds, lifecycle::Lifecycle, power};
use crate::env;
use crate::error::{Error, Kind};

/// The group's one hook at the end of a machine, if the run names none.
pub const ANY_HOOK: &str = "auto";
/// How long the group may take to reach the hook: until then it refuses the hook's completion.
const RELEASE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_secs(2);
/// The variable that says who powers the machine off.
const POWER_OFF: &str = "TRAINER_POWER_OFF";

/// The machine's fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Its group ends it.
    Group,
    /// It powers off.
    Power,
    /// The host powers it off when this process has ended.
    Host,
    /// It stays. A person must take care of it, unless the group merely did not answer: then it can be asked again.
    Stays {
        /// Whether the group has not answered.
        silence: bool,
    },
}

/// Leaves. `lifecycle_hook`: the hook that this process may complete, in the form that [`Lifecycle::find`] takes.
pub async fn leave(lifecycle_hook: &str) -> Departure {
    if let Some(identity) = identity::read().await {
        let id = &identity.instance_id;
        match autoscaling::leave(identity).await {
            autoscaling::Left::Leaving => {
                tracing::info!("on_complete: the Auto Scaling group ends {id}and lowers its desired capacity by one");
                release(lifecycle_hook).await;
                return Departure::Group;
            }
            autoscaling::Left::AtMinimum { said } => {
                tracing::error!(
                    "on_complete: {id} stays on and costs money: its group's desired capacity can't fall below the \
                    minimum ({said}); lower the group's MinSize to 0, then terminate it"
                );
                return Departure::Stays { silence: false };
            }
            autoscaling::Left::InNoGroup => tracing::info!("on_complete: {id} is in no Auto Scaling group"),
            autoscaling::Left::Failed(error) => {
                let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
                tracing::error!("on_complete: {error}{hint}");
                match identity::in_group().await {
                    Some(false) => {}
                    Some(true) => {
                        tracing::error!(
                            "on_complete: {id} stays on and costs money: powered off, it would be replaced until its \
                            group's desired capacity is lowered; allow \
                            autoscaling:TerminateInstanceInAutoScalingGroup, or terminate it by hand"
                        );
                        return Departure::Stays { silence: is_silence(&error) };
                    }
                    // It may be in a group.
                    None => {
                        tracing::error!("on_complete: {id} stays on: it is not known whether it is in a group");
                        return Departure::Stays { silence: true };
                    }
                }
            }
        }
    }
    if by_host(env::given(POWER_OFF).as_deref()) {
        tracing::info!("on_complete: the host powers the machine off ({POWER_OFF}=host)");
        return Departure::Host;
    }
    match power::off().await {
        Ok(command) => {
            tracing::info!("on_complete: powering off ({command})");
            Departure::Power
        }
        Err(error) => {
            tracing::error!("on_complete: this machine stays on and may cost money: {error}");
            Departure::Stays { silence: false }
        }
    }
}

/// Whether the host powers the machine off, by the value of [`POWER_OFF`].
fn by_host(variable: Option<&str>) -> bool {
    match variable.map(str::trim) {
        None | Some("") => false,
        Some("host") => true,
        Some(other) => {
            tracing::warn!("{POWER_OFF}={other:?} is ignored: the only value is \"host\"");
            false
        }
    }
}

/// Completes the hook at the end of this machine, if there is one, once the group waits for it.
async fn release(configured: &str) {
    let Some(imds) = Imds::from_environment() else { return };
    let variable = |name: &str| env::text(name);
    let began = Instant::now();
    let found = persist(began, PAUSE, async || Lifecycle::find(&imds, configured, &variable).await, is_silence).await;
    let outcome = match found {
        Ok(None) => return,
        Ok(Some(hook)) => persist(began, PAUSE, async || hook.complete().await, is_early).await.map(|()| hook.name()),
        Err(error) => Err(error),
    };
    match outcome {
        Ok(name) => tracing::info!("on_complete: lifecycle hook {name} is completed"),
        Err(error) => {
            let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
            tracing::warn!(
                "on_complete: a lifecycle hook may delay the end of this machine until its time-out: {error}{hint}"
            );
        }
    }
}

/// Tries until it succeeds, fails for good, or [`RELEASE`] has passed since `began`.
async fn persist<T>(
    began: Instant,
    pause: Duration,
    mut attempt: impl AsyncFnMut() -> Result<T, Error>,
    may_pass: impl Fn(&Error) -> bool,
) -> Result<T, Error> {
    loop {
        match attempt().await {
            Err(error) if may_pass(&error) && began.elapsed() < RELEASE => tokio::time::sleep(pause).await,
            answer => return answer,
        }
    }
}

/// Whether there was no answer.
fn is_silence(error: &Error) -> bool {
    error.kind() == Kind::Unavailable
}

/// The same, or the machine does not yet wait at the hook, which the API calls a validation error.
fn is_early(error: &Error) -> bool {
    is_silence(error) || error.kind() == Kind::Config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_hook_is_completed_once_the_group_waits_for_it_and_not_forever() {
        let tried = async |began: Instant, answers: &[Option<Kind>]| {
            let mut tries = 0;
            let attempt = async || {
                let answer = answers.get(tries).copied().unwrap_or(Some(Kind::Config));
                tries += 1;
                answer.map_or(Ok(()), |kind| Err(Error::new(kind, "no")))
            };
            let outcome = persist(began, Duration::ZERO, attempt, is_early).await;
            (outcome.map_err(|error| error.kind()), tries)
        };
        let now = Instant::now;
        assert_eq!(tried(now(), &[Some(Kind::Config), Some(Kind::Unavailable), None]).await, (Ok(()), 3));
        assert_eq!(tried(now(), &[Some(Kind::Permission), None]).await, (Err(Kind::Permission), 1));
        let Some(long_ago) = now().checked_sub(RELEASE) else { return };
        assert_eq!(tried(long_ago, &[]).await, (Err(Kind::Config), 1));
    }
}
