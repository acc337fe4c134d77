//! The first message of each side: what it runs and who it is.
//!
//! Both sides send theirs at once and read the other's, whatever it says; so both can name the same reason. The layout
//! of a hello never changes in `protocol` and `version`; a field of a later version is ignored.

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    end::{Build, End},
    frame::{self, Frames},
    identity::LocalNode,
    settings::{LinkSettings, MAX_HELLO},
};
use crate::ids::NodeId;

/// The version of this protocol. It rises when a message changes.
pub const PROTOCOL: u32 = 1;
/// Characters of another node's words that are shown.
const SHOWN: usize = 80;

/// As it travels. The fields are plain text, so that another version's hello is read far enough to say what differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) protocol: u32,
    pub(super) version: String,
    #[serde(default)]
    pub(super) run: String,
    #[serde(default)]
    pub(super) node: String,
}

impl Hello {
    pub(super) fn of(me: &LocalNode) -> Self {
        Self {
            protocol: PROTOCOL,
            version: me.version.clone(),
            run: me.run.as_str().into(),
            node: me.node.as_str().into(),
        }
    }
    fn build(&self) -> Build {
        Build { protocol: self.protocol, version: shown(&self.version) }
    }
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN).flat_map(char::escape_default).collect()
}

/// Whether the two can talk: `node` is the peer by its key.
pub(super) fn compare(node: &NodeId, theirs: &Hello, ours: &LocalNode) -> Result<(), End> {
    let mine = Hello::of(ours);
    if (theirs.protocol, &theirs.version) != (mine.protocol, &mine.version) {
        return Err(End::Version { node: node.clone(), theirs: theirs.build(), ours: mine.build() });
    }
    if theirs.run != mine.run {
        return Err(End::OtherRun { node: node.clone(), theirs: shown(&theirs.run), ours: ours.run.clone() });
    }
    if theirs.node != node.as_str() {
        return Err(End::OtherNode { node: node.clone(), said: shown(&theirs.node) });
    }
    Ok(())
}

/// Sends this node's hello, reads the peer's and compares; returns what was read beyond it.
pub(super) async fn introduce<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    node: &NodeId,
    me: &LocalNode,
    settings: LinkSettings,
) -> Result<Frames, End> {
    let hello = frame::encode(&Hello::of(me), MAX_HELLO).map_err(|error| End::Protocol(error.to_string()))?;
    frame::write(stream, &hello, settings.handshake).await?;
    let mut frames = Frames::default();
    let theirs = frames.next(stream, MAX_HELLO, settings.handshake).await?;
    let theirs: Hello = serde_json::from_slice(&theirs).map_err(|error| End::Protocol(format!("no hello: {error}")))?;
    compare(node, &theirs, me).map(|()| frames)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RunId;

    fn me() -> LocalNode {
        LocalNode::new(RunId::new("run").unwrap(), NodeId::new("n1").unwrap()).unwrap()
    }

    #[test]
    fn the_first_difference_is_named() {
        let (me, peer) = (me(), NodeId::new("n2").unwrap());
        let equal = Hello { node: "n2".into(), ..Hello::of(&me) };
        assert_eq!(compare(&peer, &equal, &me), Ok(()));

        let reason = |hello: Hello| compare(&peer, &hello, &me).unwrap_err();
        let older = reason(Hello { version: "0.0.9\u{1b}[2J".into(), run: "other".into(), ..equal.clone() });
        let ours = env!("CARGO_PKG_VERSION");
        assert_eq!(
            older.to_string(),
            format!("node n2 runs version 0.0.9\\u{{1b}}[2J (protocol 1), this one {ours} (protocol 1)")
        );
        let newer = reason(Hello { protocol: 2, ..equal.clone() });
        assert!(matches!(&newer, End::Version { theirs, .. } if theirs.protocol == 2), "{newer}");
        let elsewhere = reason(Hello { run: "other".into(), node: "n3".into(), ..equal.clone() });
        assert!(matches!(&elsewhere, End::OtherRun { theirs, .. } if theirs == "other"), "{elsewhere}");
        let liar = reason(Hello { node: "n3".into(), ..equal });
        assert!(matches!(&liar, End::OtherNode { said, .. } if said == "n3"), "{liar}");
    }

    #[tokio::test]
    async fn both_sides_name_the_same_difference() {
        let [ours, theirs] = ["n1", "n2"].map(|name| NodeId::new(name).unwrap());
        let (us, mut them) = (me(), me());
        (them.node, them.version) = (theirs.clone(), "0.0.9".into());
        let (mut near, mut far) = tokio::io::duplex(1 << 10);
        let settings = LinkSettings::default();
        let (here, there) =
            tokio::join!(introduce(&mut near, &theirs, &us, settings), introduce(&mut far, &ours, &them, settings));
        let ends = [here.unwrap_err(), there.unwrap_err()].map(|end| end.to_string());
        assert_eq!(ends[0], format!("node n2 runs version 0.0.9 (protocol 1), this one {} (protocol 1)", us.version));
        assert_eq!(ends[1], format!("node n1 runs version {} (protocol 1), this one 0.0.9 (protocol 1)", us.version));
    }

    #[tokio::test]
    async fn a_hello_is_short() {
        let (mut near, mut far) = tokio::io::duplex(1 << 14);
        let long = Hello { version: "x".repeat(MAX_HELLO), ..Hello::of(&me()) };
        let settings = LinkSettings::default();
        frame::write(&mut far, &frame::encode(&long, 1 << 20).unwrap(), settings.silence).await.unwrap();
        let end = introduce(&mut near, &me().node, &me(), settings).await.unwrap_err();
        assert!(matches!(&end, End::Protocol(text) if text.contains("4096 are allowed")), "{end}");
    }

    #[test]
    fn the_hello_of_another_version_is_read_far_enough() {
        for text in [
            r#"{"protocol":7,"version":"9.1","run":"r","node":"n2","kind":"new"}"#,
            r#"{"protocol":7,"version":"9.1"}"#,
        ] {
            let theirs: Hello = serde_json::from_str(text).unwrap();
            let end = compare(&NodeId::new("n2").unwrap(), &theirs, &me()).unwrap_err();
            assert!(end.to_string().contains("9.1 (protocol 7)"), "{end}");
        }
        assert_eq!(
            serde_json::to_string(&Hello { version: "0.1".into(), ..Hello::of(&me()) }).unwrap(),
            r#"{"protocol":1,"version":"0.1","run":"run","node":"n1"}"#
        );
    }
}
