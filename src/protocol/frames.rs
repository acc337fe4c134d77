//! How a message travels: 4 bytes little-endian length, then JSON.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

/// The longest message that is accepted: a plan of a model with very many tensors is a few MiB.
pub const MAX_MESSAGE: u32 = 64 << 20;

/// Writes one message, reusing `buffer`.
pub fn write_message<T: Serialize>(to: &mut impl Write, message: &T, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    buffer.extend_from_slice(&[0; 4]);
    serde_json::to_writer(&mut *buffer, message)?;
    let len = u32::try_from(buffer.len() - 4).ok().filter(|&len| len <= MAX_MESSAGE);
    let len = len.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "message too long"))?;
    buffer[..4].copy_from_slice(&len.to_le_bytes());
    to.write_all(buffer)
}

/// Reads one message; `None` at a clean end of the stream.
pub fn read_message<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<T>> {
    let mut len = [0; 4];
    let mut have = 0;
    while have < len.len() {
        match from.read(&mut len[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(more) => have += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let len = u32::from_le_bytes(len);
    if len > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("message of {len} bytes")));
    }
    // Memory is allocated as bytes arrive, not as the length promises.
    let mut body = Vec::new();
    from.take(len.into()).read_to_end(&mut body)?;
    if body.len() < len as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(serde_json::from_slice(&body)?))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{FromWorker, StartSplit, StepReport},
        *,
    };
    use crate::ids::Step;

    #[test]
    fn messages_survive_the_trip_and_a_nan_loss_too() {
        let report = StepReport {
            step: Step(3),
            loss: f64::NAN,
            grad_norm: f64::INFINITY,
            lr: 1e-3,
            step_s: 0.5,
            ..StepReport::default()
        };
        let mut wire = Vec::new();
        let mut buffer = Vec::new();
        write_message(&mut wire, &FromWorker::Step(report), &mut buffer).unwrap();
        write_message(&mut wire, &FromWorker::Ready { fingerprint: None, split: StartSplit::default() }, &mut buffer)
            .unwrap();
        let mut wire = wire.as_slice();
        let Some(FromWorker::Step(back)) = read_message(&mut wire).unwrap() else { panic!("not a step") };
        assert!(back.loss.is_nan() && back.grad_norm.is_infinite() && back.step == Step(3));
        assert!(matches!(read_message(&mut wire).unwrap(), Some(FromWorker::Ready { .. })));
        assert!(read_message::<FromWorker>(&mut wire).unwrap().is_none());
    }

    #[test]
    fn a_hostile_length_is_an_error_not_an_allocation() {
        let wire = [0xff; 8];
        assert!(read_message::<FromWorker>(&mut wire.as_slice()).is_err());
    }
}
