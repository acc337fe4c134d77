//! Compiles the C++ shim against LibTorch and tells the linker where LibTorch is.
//!
//! One source, two flavours: if `$LIBTORCH/lib` holds `libtorch_cuda.so` the shim is built with CUDA and NCCL and the
//! crate gets `cfg(torch_cuda)`; otherwise it is built for the CPU alone. `torch-sys` decides by the same file, so the
//! two always agree.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// The LibTorch that `tch` 0.24 is made for; the shim uses this version's class layouts.
const TORCH_VERSION: &str = "2.11.0";

const SOURCES: [&str; 13] = [
    "defaults.cpp",
    "group.cpp",
    "math.cpp",
    "copies.cpp",
    "fused.cpp",
    "launch.cpp",
    "nvrtc.cpp",
    "device.cpp",
    "clock.cpp",
    "memory.cpp",
    "transfer.cpp",
    "signals.cpp",
    "words.cpp",
];

/// The levels of instructions that `kernels.cpp` is compiled for: the name of its table, and the compiler's flags.
const LEVELS: [(&str, &[&str]); 3] =
    [("kernels_base", &[]), ("kernels_avx2", &["-mavx2"]), ("kernels_avx512", &["-mavx512f"])];

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=src/torch/build.rs");
    println!("cargo::rerun-if-changed=src/torch/shim");
    println!("cargo::rustc-check-cfg=cfg(torch_cuda)");
    if let Err(message) = build() {
        println!("cargo::error={message}");
    }
}

fn build() -> Result<(), String> {
    let libtorch = env::var_os("LIBTORCH").map(PathBuf::from).ok_or("LIBTORCH is not set: run scripts/setup")?;
    let lib = libtorch.join("lib");
    let library = lib.join("libtorch_cpu.so");
    // Libraries find their siblings from their real location, not from that of a link to them.
    let real = fs::canonicalize(&library)
        .map_err(|error| format!("LibTorch is missing ({}: {error}): run scripts/setup", library.display()))?;
    let real_lib = real.parent().ok_or("libtorch_cpu.so has no folder")?;
    check_version(&libtorch)?;

    let cuda = lib.join("libtorch_cuda.so").exists();
    let nvidia = real_lib.parent().and_then(Path::parent).unwrap_or(real_lib).join("nvidia");
    let shim = Path::new("src/torch/shim");
    let level = env::var("OPT_LEVEL").unwrap_or_else(|_| "1".into());
    let mut compiler = cc::Build::new();
    compiler
        .cpp(true)
        .std("c++17")
        // Its loops are hot in every profile.
        .opt_level_str(if level == "0" { "1" } else { &level })
        .include(shim)
        .include(shim.join("gloo_abi"))
        // Hides warnings about code that is not ours.
        .flag("-isystem")
        .flag(libtorch.join("include").as_os_str())
        .flag("-isystem")
        .flag(libtorch.join("include/torch/csrc/api/include").as_os_str())
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .define("USE_C10D_GLOO", None)
        .files(SOURCES.iter().map(|name| shim.join(name)));
    let is_x86 = env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64");
    if is_x86 {
        compiler.define("TRAINER_KERNEL_LEVELS", None);
    }
    for (table, flags) in LEVELS.iter().take(if is_x86 { LEVELS.len() } else { 1 }) {
        for object in kernels(shim, table, flags)? {
            compiler.object(object);
        }
    }
    // For tests of the kernels for GPUs, where there is none.
    if !cuda && env::var("PROFILE").is_ok_and(|profile| profile == "debug") {
        compiler.define("TRAINER_EMULATED", None).file(shim.join("emulated.cpp"));
    }
    if cuda {
        for folder in cuda_headers(&nvidia)? {
            compiler.flag("-isystem").flag(folder.as_os_str());
        }
        // Behind the real ones.
        compiler.flag("-isystem").flag(shim.join("cuda_abi").as_os_str());
        compiler.define("USE_C10D_NCCL", None).define("TRAINER_CUDA", None);
    }
    compiler.try_compile("trainer_torch_shim").map_err(|error| format!("the LibTorch shim: {error}"))?;

    println!("cargo::rustc-link-search=native={}", lib.display());
    if cuda {
        println!("cargo::rustc-cfg=torch_cuda");
        println!("cargo::rustc-link-lib=dylib=torch_cuda");
        println!("cargo::rustc-link-lib=dylib=c10_cuda");
        // The wheel has the library under this name alone.
        println!("cargo::rustc-link-search=native={}", nvidia.join("cu13/lib").display());
        println!("cargo::rustc-link-lib=dylib:+verbatim=libcudart.so.13");
        // cuDNN, cuBLAS and the like are needed only to run, not to build.
        println!("cargo::rustc-link-arg=-Wl,--unresolved-symbols=ignore-in-shared-libs");
    }
    println!("cargo::rustc-link-lib=dylib=torch_cpu");
    println!("cargo::rustc-link-lib=dylib=c10");
    // Part of libc from glibc 2.34 on.
    println!("cargo::rustc-link-lib=dylib=dl");
    // A shipped folder first (`trainer` beside `lib/`), then this machine's LibTorch.
    println!("cargo::rustc-link-arg=-Wl,-rpath,$ORIGIN/lib");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", real_lib.display());
    if cuda {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}", nvidia.join("cu13/lib").display());
    }
    Ok(())
}

/// One level of the kernels. They are optimised in every profile, and products are not fused with additions, so that
/// all levels give the same bits.
fn kernels(shim: &Path, table: &str, flags: &[&str]) -> Result<Vec<PathBuf>, String> {
    let mut compiler = cc::Build::new();
    compiler
        .cpp(true)
        .std("c++17")
        .opt_level(3)
        .include(shim)
        .define("KERNELS", table)
        .flag("-ffp-contract=off")
        .flag("-Wno-psabi")
        .flags(flags)
        .out_dir(PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join(table))
        .file(shim.join("kernels.cpp"));
    compiler.try_compile_intermediates().map_err(|error| format!("the fused functions ({table}): {error}"))
}

fn check_version(libtorch: &Path) -> Result<(), String> {
    for name in ["build-version", "version.py"] {
        if let Ok(text) = fs::read_to_string(libtorch.join(name)) {
            if text.contains(TORCH_VERSION) {
                return Ok(());
            }
            let found = text.lines().next().unwrap_or_default();
            return Err(format!(
                "LibTorch {TORCH_VERSION} is wanted, {} has {found}: run scripts/setup",
                libtorch.display()
            ));
        }
    }
    Err(format!("{} does not say its version: run scripts/setup", libtorch.display()))
}

/// The CUDA and NCCL headers of the wheels beside LibTorch's: `nvidia/` beside `torch/`.
fn cuda_headers(nvidia: &Path) -> Result<[PathBuf; 2], String> {
    let folders = [nvidia.join("cu13/include"), nvidia.join("nccl/include")];
    for (folder, header) in folders.iter().zip(["cuda_runtime_api.h", "nccl.h"]) {
        if !folder.join(header).exists() {
            return Err(format!("{} is missing: run scripts/setup --cuda", folder.join(header).display()));
        }
    }
    Ok(folders)
}
