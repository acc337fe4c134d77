//! The part of the agent's environment that a worker inherits.
//!
//! A worker talks to nobody but its agent and its peers, and it runs the code of large libraries: credentials of the
//! store, of the job API and of anything else on this machine are none of its business. So it gets only the variables
//! listed here by name, and of those none whose name suggests a secret.

/// Variables of the system, by their whole names.
const NAMES: [&str; 12] = [
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TMPDIR",
    "TERM",
    "NO_COLOR",
    "GLIBC_TUNABLES",
    "XDG_CACHE_HOME",
    "XDG_RUNTIME_DIR",
];

/// Settings of the loader, of the C library, of LibTorch and the libraries below it, and our own.
const PREFIXES: [&str; 38] = [
    "LC_",
    "LD_",
    "MALLOC_",
    "TCMALLOC_",
    "RUST_",
    "TRAINER_",
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "OPENBLAS_",
    "BLIS_",
    "DNNL_",
    "ONEDNN_",
    "ATEN_",
    "TORCH",
    "LIBTORCH",
    "PYTORCH_",
    "C10_",
    "C10D_",
    "CUDA_",
    "CUBLAS",
    "CUDNN_",
    "NVIDIA_",
    "NVTE_",
    "NVSHMEM_",
    "NCCL_",
    "GLOO_",
    "TP_SOCKET_",
    "UCX_",
    "UCC_",
    "FI_",
    "OFI_",
    "RDMAV_",
    "IBV_",
    "MLX",
    "SHARP_",
    "SLURM_",
];

/// Parts of the names of secrets.
const SECRET: [&str; 8] =
    ["TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY"];

/// Whether a worker gets the variable `name`.
pub fn is_for_workers(name: &str) -> bool {
    let known = NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    let name = name.to_ascii_uppercase();
    known && !name.ends_with("_KEY") && !SECRET.iter().any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_set_up_as_the_agent_is_and_secrets_stay_with_it() {
        for name in [
            "PATH",
            "LD_LIBRARY_PATH",
            "LD_PRELOAD",
            "CUDA_VISIBLE_DEVICES",
            "NCCL_SOCKET_IFNAME",
            "FI_PROVIDER",
            "OMP_WAIT_POLICY",
            "GOMP_SPINCOUNT",
            "MALLOC_ARENA_MAX",
            "PYTORCH_CUDA_ALLOC_CONF",
            "TORCH_CPP_LOG_LEVEL",
            "TRAINER_FAULTS",
            "TRAINER_LOG",
            "SLURM_LOCALID",
            "LC_ALL",
        ] {
            assert!(is_for_workers(name), "{name}");
        }
        for name in [
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "AWS_CONFIG_FILE",
            "AWS_PROFILE",
            "TORCH_SIGNING_KEY",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AZURE_STORAGE_ACCOUNT_KEY",
            "GOOGLE_APPLICATION_CREDENTIALS",
            "WORKER_TOKEN",
            "TRAINER_WORKER_TOKEN",
            "HF_TOKEN",
            "WANDB_API_KEY",
            "NVIDIA_API_KEY",
            "TORCH_password",
            "DATABASE_URL",
            "HTTPS_PROXY",
            "https_proxy",
            "SSH_AUTH_SOCK",
            "",
        ] {
            assert!(!is_for_workers(name), "{name}");
        }
    }
}
