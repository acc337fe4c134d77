//! What `on_complete.action = "terminate"` does: this machine leaves, and nothing comes in its place.
//!
//! In an Auto Scaling group it is the group that ends the machine, with its desired capacity lowered. Outside of one, and where
//! the group can't be asked, the machine powers off. Where the group's minimum forbids it to go, it stays: powered off, it would
//! be replaced at once by one that finds nothing to do and does the same, for ever. The work is done whatever comes of
//! this, so that nothing here is an error; what a person must do is said.

use super::{autoscaling, identity, power};

/// What became of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Its group ends it.
    Group,
    /// It powers off.
    Power,
    /// It stays, and a person must see to it.
    Stays,
}

/// Leaves.
pub async fn leave() -> Departure {
    if let Some(identity) = identity::read().await {
        let id = &identity.instance_id;
        match autoscaling::leave(identity).await {
            autoscaling::Left::Leaving => {
                tracing::info!("on_complete: the Auto Scaling group ends {id}; its desired capacity is one lower");
                return Departure::Group;
            }
            autoscaling::Left::AtMinimum { said } => {
                tracing::error!(
                    "on_complete: {id} stays on and costs money: its group's desired capacity can't fall below the minimum ({said}); lower the group's MinSize to 0, then end it"
                );
                return Departure::Stays;
            }
            autoscaling::Left::InNoGroup => tracing::info!("on_complete: {id} is in no Auto Scaling group"),
            autoscaling::Left::Failed(error) => {
                let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
                tracing::error!("on_complete: {error}{hint}");
                if identity::in_group().await == Some(true) {
                    tracing::error!(
                        "on_complete: the group starts another machine in place of {id} until its desired capacity is lowered: allow autoscaling:TerminateInstanceInAutoScalingGroup"
                    );
                }
            }
        }
    }
    match power::off().await {
        Ok(command) => {
            tracing::info!("on_complete: powering off ({command})");
            Departure::Power
        }
        Err(error) => {
            tracing::error!("on_complete: this machine stays on and may cost money: {error}");
            Departure::Stays
        }
    }
}
