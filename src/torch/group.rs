//! The c10d store, through which ranks find each other, and the group in which they compute together.
//!
//! Rank 0 serves the store; every rank connects to it and makes its [`ProcessGroup`] with the same prefix. Every
//! collective must be called by all ranks in the same order. The store listens on the given host's address alone where
//! that is an address of this machine, so a run on one machine opens no port to the outside.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, ToSocketAddrs, UdpSocket},
    os::fd::IntoRawFd,
    ptr,
    time::Duration,
};

use tch::{Device, Tensor};

use super::{
    Result, TorchError,
    ffi::{self, check},
};
use crate::ids::{Rank, WorldSize};

/// What carries the collectives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// TCP, for tensors on the CPU.
    Gloo,
    /// NVIDIA's library, for tensors on GPUs; only in the CUDA flavour.
    Nccl,
}

impl Backend {
    /// The one that fits tensors on `device`.
    pub fn for_device(device: Device) -> Self {
        if matches!(device, Device::Cuda(_)) { Self::Nccl } else { Self::Gloo }
    }
}

fn millis(timeout: Duration) -> i64 {
    // 0 would mean "no limit" to some callees; a limit beyond an i64 of milliseconds is none in practice.
    i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX / 2_000_000).clamp(1, i64::MAX / 2_000_000)
}

fn signed(doing: &'static str, what: &'static str, number: u32) -> Result<i32> {
    i32::try_from(number).map_err(|_| TorchError::Number { doing, what })
}

/// A c10d `TCPStore`: small keys and values that all ranks see.
#[derive(Debug)]
pub struct Store {
    handle: *mut ffi::StoreHandle,
    host: String,
    port: u16,
}

impl Store {
    /// Serves a store at `host`, an address or name of this machine, on a port of the kernel's choice.
    pub fn serve(host: &str, timeout: Duration) -> Result<Self> {
        let doing = "serve the rendezvous store on";
        let fail = |source| TorchError::Address { doing, host: host.to_owned(), source };
        let listener = match TcpListener::bind((host, 0)) {
            // Behind a translated address (a container, a service) the name that peers use is not bound here.
            Err(error) if error.kind() == std::io::ErrorKind::AddrNotAvailable => {
                TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))
            }
            other => other,
        }
        .map_err(fail)?;
        let port = listener.local_addr().map_err(fail)?.port();
        let name = ffi::c_text(doing, host)?;
        let mut handle = ptr::null_mut();
        // SAFETY: pointers are valid for the call; the socket is handed over, the shim closes it with the store.
        let status =
            unsafe { ffi::trn_store_serve(name.as_ptr(), port, listener.into_raw_fd(), millis(timeout), &mut handle) };
        check("serve the rendezvous store", status)?;
        Ok(Self { handle, host: host.to_owned(), port })
    }

    /// Connects to the store that rank 0 serves; tries again until `timeout` is over.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        let doing = "connect to the rendezvous store";
        let name = ffi::c_text(doing, host)?;
        let mut handle = ptr::null_mut();
        // SAFETY: pointers are valid for the call.
        check(doing, unsafe { ffi::trn_store_connect(name.as_ptr(), port, millis(timeout), &mut handle) })?;
        Ok(Self { handle, host: host.to_owned(), port })
    }

    /// The port on which the store is served.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address of this machine from which the store's host is reached: loopback for a host on loopback. Peers that
    /// reach the same host reach this address.
    fn local_address(&self) -> Result<IpAddr> {
        let fail = |source| TorchError::Address { doing: "find the way to", host: self.host.clone(), source };
        let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
        for target in (self.host.as_str(), self.port).to_socket_addrs().map_err(fail)? {
            let any: IpAddr =
                if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            // Connecting a datagram socket sends nothing: it asks the routing table.
            match UdpSocket::bind((any, 0)).and_then(|socket| {
                socket.connect(target)?;
                socket.local_addr()
            }) {
                Ok(address) => return Ok(address.ip()),
                Err(error) => last = error,
            }
        }
        Err(fail(last))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once; groups hold references of their own.
        unsafe { ffi::trn_store_free(self.handle) };
    }
}

/// The ranks that compute together.
///
/// Collectives return when the result is there (Gloo) or is ordered before all later work of the device's current stream
/// (NCCL). Dropping the last owner closes the connections.
#[derive(Debug)]
pub struct ProcessGroup {
    handle: *mut ffi::GroupHandle,
    rank: Rank,
    world: WorldSize,
}

impl ProcessGroup {
    /// Joins the group `prefix`; returns when all `world` ranks are connected. `timeout` is also the limit of every
    /// collective. The group keeps the store alive.
    pub fn new(
        backend: Backend,
        store: &Store,
        prefix: &str,
        rank: Rank,
        world: WorldSize,
        timeout: Duration,
        device: Device,
    ) -> Result<Self> {
        let doing = "form the process group";
        if rank.get() >= world.get() {
            return Err(TorchError::Number { doing, what: "the rank" });
        }
        let (prefix, address) = (ffi::c_text(doing, prefix)?, ffi::c_text(doing, &store.local_address()?.to_string())?);
        let mut handle = ptr::null_mut();
        // SAFETY: pointers are valid for the call.
        let status = unsafe {
            ffi::trn_group_new(
                (backend == Backend::Nccl).into(),
                store.handle,
                prefix.as_ptr(),
                address.as_ptr(),
                signed(doing, "the rank", rank.get())?,
                signed(doing, "the world size", world.get())?,
                millis(timeout),
                ffi::device_index(device)?,
                &mut handle,
            )
        };
        check(doing, status)?;
        Ok(Self { handle, rank, world })
    }

    /// This process's rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// How many ranks there are.
    pub fn world(&self) -> WorldSize {
        self.world
    }

    /// Replaces `tensor` on every rank by the sum over the ranks. Contiguous, the same extents and type everywhere.
    pub fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()> {
        // SAFETY: both are alive for the call.
        check("all-reduce", unsafe { ffi::trn_group_all_reduce_sum(self.handle, ffi::raw(tensor)) })
    }

    /// Replaces `tensor` on every rank by that of `root`. Contiguous, the same extents and type everywhere.
    pub fn broadcast(&self, tensor: &mut Tensor, root: Rank) -> Result<()> {
        let doing = "broadcast";
        if root.get() >= self.world.get() {
            return Err(TorchError::Number { doing, what: "the root rank" });
        }
        let root = signed(doing, "the root rank", root.get())?;
        // SAFETY: both are alive for the call.
        check(doing, unsafe { ffi::trn_group_broadcast(self.handle, ffi::raw(tensor), root) })
    }

    /// Returns when every rank has called it.
    pub fn barrier(&self) -> Result<()> {
        // SAFETY: the group is alive for the call.
        check("barrier", unsafe { ffi::trn_group_barrier(self.handle) })
    }

    /// Makes every collective of this rank fail, those in flight too; the group is of no more use.
    pub fn abort(&self) -> Result<()> {
        // SAFETY: the group is alive for the call.
        check("abort the process group", unsafe { ffi::trn_group_abort(self.handle) })
    }

    /// The means to [`abort`](Self::abort) from another thread while this one waits in a collective.
    pub fn aborter(&self) -> Result<Abort> {
        Ok(Abort(Self { handle: self.share()?, rank: self.rank, world: self.world }))
    }

    fn share(&self) -> Result<*mut ffi::GroupHandle> {
        let mut handle = ptr::null_mut();
        // SAFETY: pointers are valid for the call.
        check("share the process group", unsafe { ffi::trn_group_share(self.handle, &mut handle) })?;
        Ok(handle)
    }

    pub(super) fn handle(&self) -> *const ffi::GroupHandle {
        self.handle
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once; reducers hold references of their own.
        unsafe { ffi::trn_group_free(self.handle) };
    }
}

/// Aborts a [`ProcessGroup`] from any thread.
#[derive(Debug)]
pub struct Abort(ProcessGroup);

// SAFETY: c10d counts the group's owners atomically, and its `abort` is made to be called while another thread waits in
// a collective; nothing else of the group can be reached through this.
unsafe impl Send for Abort {}
// SAFETY: as above.
unsafe impl Sync for Abort {}

impl Abort {
    /// See [`ProcessGroup::abort`].
    pub fn abort(&self) -> Result<()> {
        self.0.abort()
    }
}
