//! The cost of moving bytes, apart from training: `trainer`'s own transfers beside the barest client of the same store.
//!
//! One process moves an image of shared memory up and down; the S3 server is a separate process, so that the CPU time
//! counted here is the client's alone. *bare* is the least work possible at the same concurrency and part size: uploads
//! without a checksum, and downloads that discard every byte. A figure near *bare* can improve only in the HTTP stack
//! itself. *keeping* is a bare client that copies what it downloads to its place and sums it there, as a restore must:
//! between it and *bare* lies what that costs this machine's processors and memory.

use std::{io::Write, os::unix::fs::FileExt, path::Path, sync::Arc, time::Instant};

use anyhow::Context;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::{
    ClientOptions, GetOptions, GetRange, ObjectStore, PutPayload,
    aws::{AmazonS3, AmazonS3Builder},
    multipart::MultipartStore,
};
use trainer::{
    checkpoint::restore::{RemoteFile, fetch, plan_pieces},
    snapshot::image::{Mapping, SharedImage},
    storage::{Crc64, Store},
};

use super::{Result, contender::Place, figures::median, lab, s3};

/// Files of a checkpoint that move at once.
const FILES: usize = 2;

/// The transfers and their settings.
pub struct Task {
    /// Size of one file, MiB.
    pub mib: u64,
    pub rounds: u32,
    pub concurrency: u32,
    pub part_mib: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    Trainer,
    Bare,
    /// As bare, but what it downloads is kept and summed: the least that a restore has to do. It uploads as bare does.
    Keeping,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Up,
    Down,
}

/// MB/s of one store with no training beside it: `trainer`'s transfers, and the barest client's.
#[derive(Clone, Copy, Debug)]
pub struct Ceiling {
    pub trainer_up: f64,
    pub trainer_down: f64,
    pub bare_up: f64,
    pub bare_down: f64,
}

/// Prints a table: MB/s and CPU seconds a GiB, the median round of each row.
pub fn run(task: Task, scratch: &Path) -> Result<()> {
    let field = Field::prepare(task, scratch)?;
    let rows: Vec<_> = [Place::S3, Place::Disk]
        .into_iter()
        .flat_map(|place| [Client::Trainer, Client::Bare].map(|client| (place, client)))
        .flat_map(|(place, client)| [Way::Up, Way::Down].map(|way| (place, client, way)))
        .chain([(Place::S3, Client::Keeping, Way::Down)])
        .collect();
    let mut figures: Vec<Vec<(f64, f64)>> = vec![Vec::new(); rows.len()];
    // The first round warms connections and pages, and is not counted.
    for round in 0..=field.task.rounds {
        for (&(place, client, way), figures) in rows.iter().zip(&mut figures) {
            let figure = field.measure(place, client, way)?;
            if round > 0 {
                figures.push(figure);
            }
        }
    }
    let task = &field.task;
    println!(
        "{FILES} files of {} MiB, {} requests at once, parts of {} MiB; median of {} rounds",
        task.mib, task.concurrency, task.part_mib, task.rounds
    );
    println!("| transfer | MB/s | CPU s a GiB |\n|---|---|---|");
    let middle = |values: Vec<f64>| median(&values).unwrap_or(f64::NAN);
    for ((place, client, way), rounds) in rows.iter().zip(figures) {
        let (speed, cpu): (Vec<f64>, Vec<f64>) = rounds.into_iter().unzip();
        println!("| {place:?} {way:?}, {client:?} | {:.0} | {:.3} |", middle(speed), middle(cpu));
    }
    Ok(())
}

/// Both stores, the bytes to put there, and room for those that come back.
pub struct Field {
    task: Task,
    runtime: tokio::runtime::Runtime,
    folder: tempfile::TempDir,
    on_s3: Store,
    on_disk: Store,
    bare: Arc<AmazonS3>,
    bodies: Vec<Bytes>,
    target: Mapping,
    _server: lab::Server,
}

impl Field {
    pub fn prepare(task: Task, scratch: &Path) -> Result<Self> {
        let server = lab::Server::start()?;
        let folder = tempfile::tempdir_in(scratch)?;
        let environment: Vec<(String, String)> =
            server.environment().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let settings: trainer::config::StorageConfig =
            serde_json::from_value(serde_json::json!({ "concurrency": task.concurrency, "part_mib": task.part_mib }))?;
        let len = task.mib << 20;
        let images: Vec<Mapping> = (0..FILES).map(|seed| image(len, Some(seed as u64 + 1))).collect::<Result<_>>()?;
        Ok(Self {
            runtime: tokio::runtime::Builder::new_multi_thread().enable_all().build()?,
            on_s3: Store::open_with(&format!("s3://{}/run", s3::BUCKET), &settings, &environment)?,
            on_disk: Store::open(&format!("file://{}", folder.path().display()), &settings)?,
            bare: Arc::new(bare_client(&environment)?),
            bodies: images.iter().map(|image| Ok(image.bytes(0..len)?)).collect::<Result<_>>()?,
            target: image(len * FILES as u64, Some(0))?,
            task,
            folder,
            _server: server,
        })
    }

    /// Moves all files once: MB/s, and this process's CPU seconds a GiB. A download needs an earlier upload.
    pub fn measure(&self, place: Place, client: Client, way: Way) -> Result<(f64, f64)> {
        let Self { task, bodies, bare, target, .. } = self;
        let store = if place == Place::S3 { &self.on_s3 } else { &self.on_disk };
        let folder = self.folder.path();
        self.runtime.block_on(async {
            match (client, way, place) {
                (Client::Trainer, Way::Up, _) => measured(task, put(store, bodies)).await,
                (Client::Trainer, Way::Down, _) => measured(task, take(store, bodies, target, task)).await,
                (Client::Keeping, Way::Down, Place::S3) => measured(task, keep(bare, target, task)).await,
                (Client::Bare | Client::Keeping, Way::Up, Place::S3) => {
                    measured(task, bare_put(bare, bodies, task)).await
                }
                (Client::Bare, Way::Down, Place::S3) => measured(task, bare_take(bare, task)).await,
                (_, Way::Up, Place::Disk) => measured(task, bare_write(folder, bodies)).await,
                (_, Way::Down, Place::Disk) => measured(task, bare_read(folder, task)).await,
            }
        })
    }

    /// The better of two tries of each, in turns: the first warms connections and pages.
    pub fn ceiling(&self, place: Place) -> Result<Ceiling> {
        let mut best = Ceiling { trainer_up: 0.0, trainer_down: 0.0, bare_up: 0.0, bare_down: 0.0 };
        for _ in 0..2 {
            for (client, way, best) in [
                (Client::Bare, Way::Up, &mut best.bare_up),
                (Client::Trainer, Way::Up, &mut best.trainer_up),
                (Client::Bare, Way::Down, &mut best.bare_down),
                (Client::Trainer, Way::Down, &mut best.trainer_down),
            ] {
                *best = best.max(self.measure(place, client, way)?.0);
            }
        }
        Ok(best)
    }
}

/// Runs `work`: MB/s, and this process's CPU seconds a GiB.
async fn measured(task: &Task, work: impl Future<Output = Result<()>>) -> Result<(f64, f64)> {
    let bytes = ((task.mib << 20) * FILES as u64) as f64;
    let (begun, cpu) = (Instant::now(), lab::cpu_s(std::process::id()).context("own CPU time")?);
    work.await?;
    let (took, cpu) = (begun.elapsed().as_secs_f64(), lab::cpu_s(std::process::id()).context("own CPU time")? - cpu);
    Ok((bytes / 1e6 / took, cpu / (bytes / f64::from(1 << 30))))
}

/// Shared memory with every page in place; `seed` fills it with bytes that do not repeat.
fn image(len: u64, seed: Option<u64>) -> Result<Mapping> {
    let image = SharedImage::create("bench")?;
    image.grow(len)?;
    let mapping = image.map()?;
    mapping.prefault(0..len, 1)?;
    let whole = 0..len;
    if let (Some(mut state), Some(chunk)) = (seed, mapping.chunks(std::slice::from_ref(&whole))?.first_mut()) {
        for word in chunk.as_mut().chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    Ok(mapping)
}

fn name(index: usize) -> String {
    format!("file-{index}")
}

async fn put(store: &Store, bodies: &[Bytes]) -> Result<()> {
    let puts = bodies.iter().enumerate().map(|(i, body)| {
        let (store, body) = (store.clone(), body.clone());
        tokio::spawn(async move { store.upload(&name(i), body, |_| {}).await })
    });
    for put in futures::future::try_join_all(puts).await? {
        put?;
    }
    Ok(())
}

async fn take(store: &Store, bodies: &[Bytes], target: &Mapping, task: &Task) -> Result<()> {
    let file = |(i, body): (usize, &Bytes)| RemoteFile { name: name(i), bytes: body.len() as u64, crc64: None };
    let files: Vec<RemoteFile> = bodies.iter().enumerate().map(file).collect();
    let layout = plan_pieces(&files, u64::from(task.part_mib) << 20)?;
    let ranges: Vec<_> = layout.pieces.iter().map(|p| p.image_offset..p.image_offset + p.len).collect();
    let pieces = layout.pieces.into_iter().zip(target.chunks(&ranges)?).collect();
    let store = store.clone();
    tokio::spawn(async move { fetch(&store, "", &files, pieces, |_| {}).await }).await??;
    Ok(())
}

fn bare_client(environment: &[(String, String)]) -> Result<AmazonS3> {
    let mut builder = AmazonS3Builder::new();
    for (name, value) in environment {
        if let Ok(key) = name.to_ascii_lowercase().parse() {
            builder = builder.with_config(key, value);
        }
    }
    let options = ClientOptions::new().with_timeout_disabled().with_allow_http(true);
    Ok(builder
        .with_bucket_name(s3::BUCKET)
        .with_virtual_hosted_style_request(false)
        .with_client_options(options)
        .with_unsigned_payload(true)
        .build()?)
}

async fn bare_put(client: &Arc<AmazonS3>, bodies: &[Bytes], task: &Task) -> Result<()> {
    let part = (task.part_mib as usize) << 20;
    let puts = bodies.iter().enumerate().map(|(i, body)| {
        let (client, body) = (client.clone(), body.clone());
        let at_once = (task.concurrency as usize / FILES).max(1);
        tokio::spawn(async move {
            let path = object_store::path::Path::from(format!("bare/{}", name(i)));
            let id = client.create_multipart(&path).await?;
            let parts = (0..body.len().div_ceil(part)).map(|n| {
                let (client, path, id) = (client.clone(), path.clone(), id.clone());
                let data = body.slice(n * part..body.len().min((n + 1) * part));
                async move {
                    tokio::spawn(async move { client.put_part(&path, &id, n, PutPayload::from_bytes(data)).await })
                        .await
                }
            });
            let ids: Vec<_> = stream::iter(parts).buffered(at_once).try_collect::<Vec<_>>().await?;
            client.complete_multipart(&path, &id, ids.into_iter().collect::<object_store::Result<_>>()?).await?;
            Ok::<_, anyhow::Error>(())
        })
    });
    for put in futures::future::try_join_all(puts).await? {
        put?;
    }
    Ok(())
}

/// Reads everything and keeps nothing.
async fn bare_take(client: &Arc<AmazonS3>, task: &Task) -> Result<()> {
    let (len, part) = (task.mib << 20, u64::from(task.part_mib) << 20);
    let ranges = (0..FILES).flat_map(|i| (0..len.div_ceil(part)).map(move |n| (i, n * part..len.min((n + 1) * part))));
    let gets = ranges.map(|(i, range)| {
        let client = client.clone();
        async move {
            tokio::spawn(async move {
                let path = object_store::path::Path::from(format!("bare/{}", name(i)));
                let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
                let mut chunks = client.get_opts(&path, options).await?.into_stream();
                while let Some(chunk) = chunks.next().await {
                    chunk?;
                }
                Ok::<_, anyhow::Error>(())
            })
            .await?
        }
    });
    stream::iter(gets).buffer_unordered(task.concurrency as usize).try_collect().await
}

/// Reads everything into its place and sums it there, as it comes.
async fn keep(client: &Arc<AmazonS3>, target: &Mapping, task: &Task) -> Result<()> {
    let (len, part) = (task.mib << 20, u64::from(task.part_mib) << 20);
    let ranges: Vec<(usize, std::ops::Range<u64>)> =
        (0..FILES).flat_map(|i| (0..len.div_ceil(part)).map(move |n| (i, n * part..len.min((n + 1) * part)))).collect();
    let places: Vec<_> = ranges.iter().map(|(i, at)| *i as u64 * len + at.start..*i as u64 * len + at.end).collect();
    let gets = ranges.into_iter().zip(target.chunks(&places)?).map(|((i, range), mut place)| {
        let client = client.clone();
        async move {
            tokio::spawn(async move {
                let path = object_store::path::Path::from(format!("bare/{}", name(i)));
                let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
                let mut chunks = client.get_opts(&path, options).await?.into_stream();
                let (mut left, mut sum) = (place.as_mut(), Crc64::EMPTY);
                while let Some(chunk) = chunks.next().await {
                    let chunk = chunk?;
                    let (here, rest) = std::mem::take(&mut left)
                        .split_at_mut_checked(chunk.len())
                        .context("more bytes than asked for")?;
                    let next = Crc64::of_copy(&chunk, here).context("a chunk of another length")?;
                    (sum, left) = (sum.followed_by(next, chunk.len() as u64), rest);
                }
                Ok::<_, anyhow::Error>(sum)
            })
            .await?
        }
    });
    stream::iter(gets).buffer_unordered(task.concurrency as usize).try_collect::<Vec<_>>().await.map(drop)
}

/// One file per thread, written in order through the page cache, synced, and renamed into place.
async fn bare_write(folder: &Path, bodies: &[Bytes]) -> Result<()> {
    let writes = bodies.iter().enumerate().map(|(i, body)| {
        let (path, body) = (folder.join(format!("bare-{i}")), body.clone());
        tokio::task::spawn_blocking(move || {
            let hidden = path.with_extension("new");
            let mut file = std::fs::File::create(&hidden)?;
            file.write_all(&body)?;
            file.sync_all()?;
            std::fs::rename(hidden, path)
        })
    });
    for write in futures::future::try_join_all(writes).await? {
        write?;
    }
    Ok(())
}

/// Positioned reads into one small buffer per request.
async fn bare_read(folder: &Path, task: &Task) -> Result<()> {
    let (len, part) = (task.mib << 20, u64::from(task.part_mib) << 20);
    let ranges = (0..FILES).flat_map(|i| (0..len.div_ceil(part)).map(move |n| (i, n * part..len.min((n + 1) * part))));
    let reads = ranges.map(|(i, range)| {
        let path = folder.join(format!("bare-{i}"));
        async move {
            tokio::task::spawn_blocking(move || {
                let file = std::fs::File::open(path)?;
                let mut buffer = vec![0; 256 << 10];
                for at in range.clone().step_by(buffer.len()) {
                    let len = buffer.len().min((range.end - at) as usize);
                    file.read_exact_at(&mut buffer[..len], at)?;
                }
                Ok::<_, anyhow::Error>(())
            })
            .await?
        }
    });
    stream::iter(reads).buffer_unordered(task.concurrency as usize).try_collect().await
}
