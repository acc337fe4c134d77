//! TensorBoard's event files.
//!
//! A file is a row of TFRecords (tensorflow/core/lib/io/record_writer.h): the length as a little-endian u64, the masked
//! CRC-32C of these eight bytes, the message, and its masked CRC-32C. A message is an `Event`
//! (tensorflow/core/util/event.proto) in protocol buffers' wire format: the first one names the format's version, the
//! others have summaries (tensorflow/core/framework/summary.proto) of one value each. Scalars are 32-bit floats there.

use std::io::Write;

use super::series::Series;

/// The name of the event file within its folder; TensorBoard knows it by `tfevents`.
pub const NAME: &str = "events.out.tfevents.0000000001.trainer";

/// Writes the curve, and `config` as text, as one event file.
pub fn write(curve: &Series, config: &str, to: &mut impl Write) -> std::io::Result<()> {
    let begin = curve.at_ms.first().copied().unwrap_or_default();
    let mut event = Message::default();
    event.double(1, seconds(begin));
    event.bytes(3, b"brain.Event:2");
    record(to, &event.0)?;
    record(to, &summary(begin, 0, &text("configuration", config)))?;
    let columns: Vec<(String, &[f64])> =
        curve.names().filter_map(|name| Some((tag(name), curve.column(name)?))).collect();
    for (row, (&step, &at)) in curve.steps.iter().zip(&curve.at_ms).enumerate() {
        for (tag, values) in &columns {
            let value = values[row];
            if !value.is_nan() {
                let mut scalar = Message::default();
                scalar.bytes(1, tag.as_bytes());
                scalar.float(2, value as f32);
                record(to, &summary(at, step, &scalar))?;
            }
        }
    }
    to.flush()
}

/// The name of a chart: those of one group stand together.
fn tag(name: &str) -> String {
    match name {
        "loss" | "held_out_loss" => format!("loss/{name}"),
        name if name.starts_with("held_out/") => format!("loss/{name}"),
        "lr" | "grad_norm" => format!("optimizer/{name}"),
        "copy_s" | "durable_s" | "stall_s" | "lag_s" => format!("checkpoint/{name}"),
        name if name.ends_with("_bytes") => format!("memory/{name}"),
        name => format!("time/{name}"),
    }
}

fn seconds(at_ms: i64) -> f64 {
    at_ms as f64 / 1e3
}

/// An event with one value.
fn summary(at_ms: i64, step: u64, value: &Message) -> Vec<u8> {
    let (mut event, mut summary) = (Message::default(), Message::default());
    summary.bytes(1, &value.0);
    event.double(1, seconds(at_ms));
    event.number(2, step);
    event.bytes(5, &summary.0);
    event.0
}

/// A value of the text plugin: a tensor of one string.
fn text(tag: &str, text: &str) -> Message {
    const STRING: u64 = 7;
    let [mut value, mut metadata, mut plugin, mut tensor, mut shape, mut extent] = [const { Message(Vec::new()) }; 6];
    plugin.bytes(1, b"text");
    metadata.bytes(1, &plugin.0);
    extent.number(1, 1);
    shape.bytes(2, &extent.0);
    tensor.number(1, STRING);
    tensor.bytes(2, &shape.0);
    tensor.bytes(8, text.as_bytes());
    value.bytes(1, tag.as_bytes());
    value.bytes(9, &metadata.0);
    value.bytes(8, &tensor.0);
    value
}

/// A message in protocol buffers' wire format (protobuf.dev/programming-guides/encoding).
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value as u8) | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn number(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }
}

fn record(to: &mut impl Write, message: &[u8]) -> std::io::Result<()> {
    let len = (message.len() as u64).to_le_bytes();
    to.write_all(&len)?;
    to.write_all(&masked(&len).to_le_bytes())?;
    to.write_all(message)?;
    to.write_all(&masked(message).to_le_bytes())
}

/// The CRC-32C of these bytes, rotated and moved, so that a checksum of checksums is none of their data.
fn masked(bytes: &[u8]) -> u32 {
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::{
        super::series::tests::{row, series},
        *,
    };

    /// The first record of a file that TensorBoard's own writer made: the version, at 1700000000 s.
    #[test]
    fn records_are_framed_as_tensorboard_has_them() {
        let mut event = Message::default();
        event.double(1, 1_700_000_000.0);
        event.bytes(3, b"brain.Event:2");
        let mut file = Vec::new();
        record(&mut file, &event.0).unwrap();
        assert_eq!(file.len(), 12 + 24 + 4);
        assert_eq!(file[..8], 24_u64.to_le_bytes());
        assert_eq!(masked(b"123456789"), 0xe306_9283_u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    #[test]
    fn every_figure_of_every_step_is_an_event() {
        let curve = series((1..=300).map(|step| row(1, step))).curve();
        let mut file = Vec::new();
        write(&curve, "steps = 300", &mut file).unwrap();
        let (mut at, mut count) = (0, 0);
        while at < file.len() {
            let len = u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
            let message = &file[at + 12..at + 12 + len];
            assert_eq!(file[at + 12 + len..at + 16 + len], masked(message).to_le_bytes());
            at += 16 + len;
            count += 1;
        }
        assert_eq!(count, 2 + 2 * 300);
    }
}
