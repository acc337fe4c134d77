//! What every message carries beside its content.

use serde::{Deserialize, Serialize};

use crate::ids::Generation;

/// A message, the generation that it belongs to, and its number on its link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// The generation that the sender spoke for.
    pub generation: Generation,
    /// Counted from 1 on each link and in each direction, by the sender's half of the link.
    pub seq: u64,
    /// The message.
    pub body: T,
}

impl<T> Envelope<T> {
    /// The receiver's filter: `None` for a message of a generation before `current`, which was on its way while the
    /// group formed anew and asks for nothing any more. A later generation's message, such as an invitation, passes.
    pub fn unless_old(self, current: Generation) -> Option<Self> {
        (self.generation >= current).then_some(self)
    }
}

/// What travels after the hello.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Wire<T> {
    /// "I am here"; sent when there was nothing else to say.
    Ping,
    /// A message.
    Message(Envelope<T>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_an_old_generation_are_dropped_and_later_ones_pass() {
        let message = |generation| Envelope { generation: Generation(generation), seq: 1, body: () };
        assert_eq!(message(2).unless_old(Generation(3)), None);
        assert!(message(3).unless_old(Generation(3)).is_some());
        assert!(message(4).unless_old(Generation(3)).is_some());
    }

    #[test]
    fn the_form_on_the_wire() {
        let wire = Wire::Message(Envelope { generation: Generation(3), seq: 7, body: "x" });
        let text = r#"{"message":{"generation":3,"seq":7,"body":"x"}}"#;
        assert_eq!(serde_json::to_string(&wire).unwrap(), text);
        assert_eq!(serde_json::to_string(&Wire::<()>::Ping).unwrap(), r#""ping""#);
    }
}
