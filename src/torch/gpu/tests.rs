//! The kernels for GPUs without one: compiled for each kind, and emulated on the CPU.

use super::*;

/// While it exists, this thread computes tensors of the CPU by the kernels for GPUs.
#[derive(Debug)]
pub(in crate::torch) struct Emulated;

impl Emulated {
    /// `None`, and a line that says so: this program is made without the emulation.
    pub(in crate::torch) fn begin() -> Option<Self> {
        // SAFETY: takes a flag.
        match check("emulate a GPU", unsafe { ffi::trn_gpu_emulate(1) }) {
            Ok(()) => Some(Self),
            Err(error) => {
                if cfg!(debug_assertions) && !cfg!(torch_cuda) {
                    panic!("{error}");
                }
                println!("SKIPPED: {error}");
                None
            }
        }
    }

    /// The forms of kernels that there are, and those that this thread has emulated.
    pub(in crate::torch) fn forms() -> (u64, u64) {
        let (mut all, mut done) = (0, 0);
        // SAFETY: pointers are valid for the call.
        check("count emulated kernels", unsafe { ffi::trn_gpu_emulated(&mut all, &mut done) }).unwrap();
        (all, done)
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        // SAFETY: takes a flag.
        unsafe { ffi::trn_gpu_emulate(0) };
    }
}

/// The compiler that `scripts/test` fetches, or that of a LibTorch for GPUs.
fn compiler() -> Option<Compiler> {
    let fetched = env::cache_folder().map(|it| it.join("libtorch-2.11.0-cuda-build/nvidia/cu13/lib").join(LIBRARY));
    let fetched = fetched.filter(|library| library.exists());
    let library = fetched.map_or(LIBRARY.to_owned(), |library| library.display().to_string());
    match Compiler::open(&library) {
        Ok(compiler) => Some(compiler),
        Err(error) => {
            println!("SKIPPED: kernels are not compiled for GPUs: {error}; scripts/setup --cuda-build fetches it");
            None
        }
    }
}

/// The number behind each `word` of the log.
fn numbers_before(word: &str, log: &str) -> Vec<u32> {
    let found = log.match_indices(word).map(|(at, _)| log[..at].trim_end());
    let number = |text: &str| text.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
    found.map(number).collect()
}

#[test]
fn every_kernel_compiles_for_every_kind_of_gpu_and_keeps_its_numbers_in_registers() {
    let Some(compiler) = compiler() else { return };
    for capability in [80, 86, 89, 90] {
        let mut options = options(capability);
        options.push("--ptxas-options=--verbose".to_owned());
        let Compiled { image, log } = compiler.compile(SOURCE, &options).unwrap();
        assert!(image.starts_with(b"\x7fELF"));
        let (spills, registers) = (numbers_before("bytes spill stores", &log), numbers_before("registers", &log));
        let (forms, _) = Emulated::forms();
        assert_eq!((spills.len() as u64, registers.len() as u64), (forms, forms), "sm_{capability}: {log}");
        assert!(spills.iter().all(|spill| *spill == 0), "sm_{capability}: {log}");
        // So 1,024 threads are at work on each multiprocessor at least.
        assert!(registers.iter().all(|count| *count <= 64), "sm_{capability}: {log}");
        println!("sm_{capability}: {} bytes, {} registers at most", image.len(), registers.iter().max().unwrap());
    }
}

#[test]
fn what_does_not_compile_is_an_error_with_the_compilers_words() {
    let Some(compiler) = compiler() else { return };
    let error = compiler.compile("__global__ void f() { no_such_thing(); }", &options(90)).unwrap_err();
    assert!(error.to_string().contains("no_such_thing"), "{error}");
    assert!(compiler.compile(SOURCE, &options(1)).is_err(), "there is no such GPU");
}

#[test]
fn a_compiler_that_is_not_there_is_an_error_that_names_it() {
    let error = Compiler::open("libno-such-thing.so.1").unwrap_err();
    assert!(error.to_string().contains("libno-such-thing.so.1"), "{error}");
}

#[test]
fn kept_code_is_whole_or_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("deep/er");
    assert!(kept(&folder, "a").is_none());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| keep(&folder, "a", b"code").unwrap());
        }
    });
    assert_eq!(kept(&folder, "a").unwrap(), b"code");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing else is left");
    let whole = fs::read(folder.join("a")).unwrap();
    for cut in 0..whole.len() {
        fs::write(folder.join("a"), &whole[..cut]).unwrap();
        assert!(kept(&folder, "a").is_none(), "{cut} bytes");
    }
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        fs::write(folder.join("a"), &damaged).unwrap();
        assert!(kept(&folder, "a").is_none(), "byte {at}");
    }
    keep(&folder, "a", b"code").unwrap();
    assert_eq!(kept(&folder, "a").unwrap(), b"code", "a damaged file is replaced");
}

#[test]
fn a_file_is_for_one_source_one_kind_of_gpu_and_one_driver() {
    let of = |capability, driver| name(capability, &options(capability), driver);
    assert_eq!(of(90, 13000), of(90, 13000));
    assert_ne!(of(90, 13000), of(89, 13000));
    assert_ne!(of(90, 13000), of(90, 13010));
    assert_ne!(of(90, 13000), name(90, &[], 13000));
    assert!(of(90, 13000).starts_with("sm_90-") && of(90, 13000).ends_with(".cubin"));
}
