//! The kernels for GPUs (`shim/gpu.cu`): compiled when a worker starts, kept on disk, loaded.
//!
//! NVIDIA's run-time compiler, which comes with LibTorch, makes them for the very GPU that is there. That takes a few
//! seconds once; the next worker finds the result. A process that has loaded them keeps them to its end.
//!
//! *Stored:* a file for each kind of GPU in the user's cache, `trainer/kernels/sm_90-DIGEST.cubin`. The digest is that
//! of the source, the options and the driver's version, so a file never changes its meaning. It begins with a line that
//! says what it is and a line with the SHA-256 of the rest, which is the code.
//!
//! *Invariants:* code is loaded only if its digest is right. A file appears whole, by a rename, and any number of
//! workers may write the same one at once. *Crash:* leaves a file whose name begins with a dot, which nobody reads.
//! *Errors:* a cache that can't be read or written is none; a compiler or a driver that refuses is an error, and the
//! caller computes without these kernels.

use std::{
    ffi::{CString, c_char},
    fs::{self, File},
    io::{self, Write},
    path::Path,
    ptr, slice,
};

use sha2::{Digest, Sha256};
use tch::Device;

use super::{
    Result, TorchError, device_kind,
    ffi::{self, check},
};
use crate::{env, ids::random_hex};

/// What is compiled.
const SOURCE: &str = concat!(include_str!("shim/gpu_args.h"), include_str!("shim/gpu.cu"));

/// The compiler's library, where the loader finds LibTorch's.
const LIBRARY: &str = "libnvrtc.so.13";

/// The first line of a file of the cache.
const MAGIC: &str = "trainer kernels 1\n";

/// Makes the kernels ready for `device`: those that are kept, if there are such, otherwise newly compiled ones.
pub(super) fn load(device: Device) -> Result<()> {
    let Some(kind) = device_kind(device)? else { return Err(TorchError::Device(device)) };
    let (index, options) = (ffi::device_index(device)?, options(kind.capability));
    let name = name(kind.capability, &options, driver_version()?);
    let folder = env::cache_folder().map(|folder| folder.join("kernels"));
    if let Some(image) = folder.as_deref().and_then(|folder| kept(folder, &name)) {
        match load_image(index, &image) {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!(%error, "kept kernels can't be loaded: they are compiled again"),
        }
    }
    let Compiled { image, .. } = Compiler::open(LIBRARY)?.compile(SOURCE, &options)?;
    load_image(index, &image)?;
    if let Some(folder) = folder
        && let Err(error) = keep(&folder, &name, &image)
    {
        tracing::debug!(%error, "compiled kernels are not kept");
    }
    Ok(())
}

fn load_image(index: i32, image: &[u8]) -> Result<()> {
    // SAFETY: the image is whole, as the compiler made it; the driver copies it.
    check("load the kernels", unsafe { ffi::trn_gpu_load(index, image.as_ptr().cast()) })
}

fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the pointer is valid for the call.
    check("ask for the driver's version", unsafe { ffi::trn_gpu_driver(&mut version) })?;
    Ok(version)
}

/// How the kernels are compiled for a GPU of this compute capability, such as 90.
fn options(capability: u32) -> Vec<String> {
    vec![format!("--gpu-architecture=sm_{capability}"), "--std=c++17".to_owned()]
}

/// The name of the file that keeps them.
fn name(capability: u32, options: &[String], driver: i32) -> String {
    let mut digest = Sha256::new();
    for part in options.iter().map(String::as_str).chain([driver.to_string().as_str(), SOURCE]) {
        // Lengths in front, so that no two lists of parts are one text.
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part.as_bytes());
    }
    format!("sm_{capability}-{}.cubin", hex(&digest.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The code in this file of the cache; `None`: there is none, or it is damaged.
fn kept(folder: &Path, name: &str) -> Option<Vec<u8>> {
    let file = fs::read(folder.join(name)).ok()?;
    let rest = file.strip_prefix(MAGIC.as_bytes())?;
    let (digest, image) = rest.split_at_checked(64)?;
    let image = image.strip_prefix(b"\n")?;
    (hex(&Sha256::digest(image)).as_bytes() == digest && !image.is_empty()).then(|| image.to_vec())
}

fn keep(folder: &Path, name: &str, image: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    // Workers of several containers may have one folder, and equal process ids.
    let partial = folder.join(format!(".{name}.{}", random_hex(8)));
    let written = (|| {
        let mut file = File::create(&partial)?;
        file.write_all(format!("{MAGIC}{}\n", hex(&Sha256::digest(image))).as_bytes())?;
        file.write_all(image)?;
        fs::rename(&partial, folder.join(name))
    })();
    if written.is_err() {
        // Otherwise there is nothing left of it.
        let _ = fs::remove_file(&partial);
    }
    written
}

/// NVIDIA's run-time compiler.
#[derive(Debug)]
struct Compiler {
    handle: *mut ffi::CompilerHandle,
}

/// What it has made.
#[derive(Debug)]
struct Compiled {
    /// Code for one kind of GPU.
    image: Vec<u8>,
    /// What the compiler says beside.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests look for spilled registers"))]
    log: String,
}

impl Compiler {
    /// `library`: its path, or its name for the loader to find.
    fn open(library: &str) -> Result<Self> {
        let doing = "open NVRTC";
        let library = ffi::c_text(doing, library)?;
        let (mut version, mut handle) = (0, ptr::null_mut());
        // SAFETY: pointers are valid for the call.
        check(doing, unsafe { ffi::trn_nvrtc_open(library.as_ptr(), &mut version, &mut handle) })?;
        tracing::debug!(version, "kernels are compiled by NVRTC");
        Ok(Self { handle })
    }

    fn compile(&self, source: &str, options: &[String]) -> Result<Compiled> {
        let doing = "compile kernels";
        let source = ffi::c_text(doing, source)?;
        let options = options.iter().map(|option| ffi::c_text(doing, option)).collect::<Result<Vec<CString>>>()?;
        let raws: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut handle = ptr::null_mut();
        let count = i32::try_from(raws.len()).map_err(|_| TorchError::Number { doing, what: "the options" })?;
        // SAFETY: pointers are valid for the call, and there are as many options as it is told.
        let status = unsafe { ffi::trn_nvrtc_compile(self.handle, source.as_ptr(), raws.as_ptr(), count, &mut handle) };
        check(doing, status)?;
        let (mut image, mut image_bytes, mut log, mut log_bytes) = (ptr::null(), 0, ptr::null(), 0);
        // SAFETY: the handle was just made; the other pointers are valid for the call.
        let status = unsafe { ffi::trn_compiled_parts(handle, &mut image, &mut image_bytes, &mut log, &mut log_bytes) };
        let compiled = check(doing, status).map(|()| {
            // SAFETY: the shim said where its bytes are, which it keeps until the handle is freed.
            let (image, log) = unsafe {
                (slice::from_raw_parts(image.cast(), image_bytes), slice::from_raw_parts(log.cast(), log_bytes))
            };
            Compiled { image: image.to_vec(), log: String::from_utf8_lossy(log).into_owned() }
        });
        // SAFETY: made by the shim and freed once.
        unsafe { ffi::trn_compiled_free(handle) };
        compiled
    }
}

impl Drop for Compiler {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once.
        unsafe { ffi::trn_nvrtc_free(self.handle) };
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(super) use tests::Emulated;
