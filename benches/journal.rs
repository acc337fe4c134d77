//! Opening the journal of a run that has lived for months: time and requests, through summaries and record by record.
//!
//! The journal is generated: a run that saves every ten seconds, two records a save, with occasional interruptions. It
//! is written as the program writes it, and read as every command reads it.

use std::{fs, path::Path, time::Instant};

use bytes::Bytes;
use serde_json::json;
use trainer::{
    config::StorageConfig,
    ids::{NodeId, RunId},
    journal::{self, Journal},
    storage::Store,
};

use super::{Result, s3};

/// How often a machine goes away.
const SAVES_A_LIFE: u64 = 700;

/// Prints a table: for each store, a young run, the long one, and the long one without its summaries.
pub fn run(records: u64, created: &Path, scratch: &Path) -> Result<()> {
    let scratch = fs::canonicalize(scratch)?.join("bench-journal");
    let _ = fs::remove_dir_all(&scratch);
    let run = scratch.join("long");
    fs::create_dir_all(run.join("journal"))?;
    let created: serde_json::Value = serde_json::from_slice(&fs::read(created)?)?;
    let run_id = RunId::new(created["record"]["run_id"].as_str().unwrap_or_default())?;
    let settings = StorageConfig::plain(8, 8);
    let uri = format!("file://{}", scratch.display());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let begun = Instant::now();
    for (number, body) in story(&created, records).enumerate() {
        fs::write(run.join(format!("journal/{number:020}.json")), body?)?;
    }
    eprintln!("{records} records written in {:.1} s", begun.elapsed().as_secs_f64());
    println!("| journal | store | seconds | requests |\n|---|---|---|---|");
    let disk = Store::open(&uri, &settings)?.folder("long");
    let timed = |store: &Store, what: &str, place: &str, count: &dyn Fn() -> u64| -> Result<u64> {
        let (begun, before) = (Instant::now(), count());
        let state = runtime.block_on(journal::replay(store, &run_id))?;
        let requests = match count() - before {
            0 => "–".to_owned(),
            requests => requests.to_string(),
        };
        println!("| {what}, {} records | {place} | {:.2} | {requests} |", state.next(), begun.elapsed().as_secs_f64());
        Ok(state.next())
    };
    timed(&disk, "without summaries", "disk", &|| 0)?;
    // The next writer fills in all missing summaries when it reaches the end of one.
    runtime.block_on(async {
        let mut journal = Journal::open(disk.clone(), NodeId::random(), run_id.clone()).await?;
        let generation = journal.state().generation();
        for _ in 0..16 {
            let (source, means) = ("bench".to_owned(), journal::Means::Rebalance);
            journal.append(journal::Record::Notice { generation, source, deadline_s: None, means }).await?;
        }
        journal.summed_up(std::time::Duration::from_secs(600)).await;
        anyhow::Ok(())
    })?;
    timed(&disk, "with summaries", "disk", &|| 0)?;

    let server = s3::S3Server::start();
    let environment: Vec<_> =
        s3::client_env(&server.endpoint()).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let remote = Store::open_with(&format!("s3://{}/runs", s3::BUCKET), &settings, &environment)?.folder("long");
    copy(&run, &run, &mut |key, body| server.write(&format!("runs/long/{key}"), body))?;
    let count = || ["GetObject", "HeadObject", "ListObjectsV2"].iter().map(|kind| server.count(kind)).sum::<u64>();
    timed(&remote, "with summaries", "S3", &count)?;
    for key in server.keys("runs/long/summaries/") {
        server.remove(&key);
    }
    if records <= 150_000 {
        timed(&remote, "without summaries", "S3", &count)?;
    }
    for key in server.keys("runs/long/journal/").into_iter().skip(20) {
        server.remove(&key);
    }
    timed(&remote, "young", "S3", &count)?;
    fs::remove_dir_all(scratch)?;
    Ok(())
}

/// Every object below a folder, by its key.
fn copy(root: &Path, folder: &Path, put: &mut dyn FnMut(&str, Bytes)) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            copy(root, &path, put)?;
        } else {
            put(&path.strip_prefix(root)?.display().to_string(), fs::read(&path)?.into());
        }
    }
    Ok(())
}

/// The records of such a run, as they are stored.
fn story(created: &serde_json::Value, records: u64) -> impl Iterator<Item = Result<Vec<u8>>> {
    let created = created.clone();
    let (mut step, mut generation, mut saves, mut kept) = (0_u64, 0_u64, 0_u64, Vec::new());
    let mut prunes = false;
    (0..records).map(move |number| {
        let record = if number == 0 {
            created["record"].clone()
        } else if generation == 0 || (saves == SAVES_A_LIFE && !prunes) {
            (saves, generation) = (0, generation + 1);
            let resume = kept.last().map(|(step, generation)| json!({"step": step, "generation": generation}));
            json!({"kind": "formed", "generation": generation, "roster": [{"node": "n1", "workers": 8}],
                "world_size": 8, "resume": resume, "overrides": [], "reason": "started"})
        } else if prunes && kept.len() > 4 {
            prunes = false;
            let (step, generation): (u64, u64) = kept.remove(0);
            json!({"kind": "pruned", "step": step, "generation": generation})
        } else {
            (step, saves, prunes) = (step + 37, saves + 1, true);
            kept.push((step, generation));
            let name = format!("checkpoints/s{step:08}-g{generation:04}/manifest.json");
            let noise = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / 1e7;
            json!({"kind": "committed", "step": step, "generation": generation, "manifest": name,
                "manifest_crc64": format!("{:016x}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
                "bytes": 1_700_000_000,
                "loss": 2.0 + noise, "validation_loss": null,
                "cost": {"stall_s": 0.01 + noise / 100.0, "copy_s": 0.2 + noise / 10.0, "durable_s": 3.0 + noise}})
        };
        let second = 1_790_000_000 + i64::try_from(number)? * 5;
        let entry = json!({"format": 1, "attempt": "00112233445566778899aabbccddeeff",
            "at": jiff::Timestamp::new(second, 123_456_789)?, "node": "n1", "record": record});
        // In the program's own spelling, so that it is packed like the program's own records.
        Ok(journal::Entry::decode(entry.to_string().as_bytes())?.encode()?)
    })
}
