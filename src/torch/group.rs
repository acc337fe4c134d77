//! The c10d store, through which ranks find each other, and the group in which they compute together.
//!
//! Rank 0 serves the store; every rank connects to it and makes its [`ProcessGroup`] with the same prefix. Every
//! collective must be called by all ranks in the same order. The store has no authentication: it listens only on the
//! given host's address, so a run on one machine opens no port to the outside; an address that is not this machine's is
//! an error.

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

/// The transport of collectives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// TCP, for tensors on the CPU.
    Gloo,
    /// NVIDIA's library, for tensors on GPUs; only in the CUDA flavour.
    Nccl,
}

impl Backend {
    /// The one that fits tensors on `device`. NCCL refuses ranks that have one device together (`shared`); Gloo moves
    /// tensors through the host's memory.
    pub fn for_device(device: Device, shared: bool) -> Self {
        if matches!(device, Device::Cuda(_)) && !shared { Self::Nccl } else { Self::Gloo }
    }
}

fn millis(timeout: Duration) -> i64 {
    // 0 would mean "no limit" to some callees; a limit beyond an i64 of milliseconds is no limit in practice.
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
    /// Serves a store at `host`, an address or name of this machine, on this port; 0: one of the kernel's choice.
    pub fn serve(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        let doing = "serve the rendezvous store on";
        let fail = |source| TorchError::Address { doing, host: host.to_owned(), source };
        // Never on all addresses: every peer that reaches the store can write into it.
        let listener = TcpListener::bind((host, port)).map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        if address.ip().is_unspecified() {
            return Err(fail(std::io::ErrorKind::InvalidInput.into()));
        }
        let port = address.port();
        let name = ffi::c_text(doing, host)?;
        let mut handle = ptr::null_mut();
        // SAFETY: pointers are valid for the call; the socket is handed over, the shim closes it with the store.
        let status =
            unsafe { ffi::trn_store_serve(name.as_ptr(), port, listener.into_raw_fd(), millis(timeout), &mut handle) };
        check("serve the rendezvous store", status)?;
        Ok(Self { handle, host: host.to_owned(), port })
    }

    /// Connects to the store that rank 0 serves. Tries until `timeout` is over, then once more for as long.
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
    /// reach that host also reach this address.
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
/// Collectives return when the result is there (Gloo) or ordered before all later work of the device's current stream
/// (NCCL). Dropping the last owner closes the connections.
#[derive(Debug)]
pub struct ProcessGroup {
    handle: *mut ffi::GroupHandle,
    rank: Rank,
    world: WorldSize,
}

impl ProcessGroup {
    /// Joins the group `prefix`; returns when all `world` ranks are connected. `timeout` is also the limit of every
    /// collective, until [`ProcessGroup::set_timeout`]. The group keeps the store alive.
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
        if backend == Backend::Nccl && !(cfg!(torch_cuda) && matches!(device, Device::Cuda(_))) {
            return Err(TorchError::NoNccl);
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

    /// The number of ranks.
    pub fn world(&self) -> WorldSize {
        self.world
    }

    /// The limit of every collective that is begun from now on. Call it while none is under way.
    pub fn set_timeout(&self, timeout: Duration) -> Result<()> {
        // SAFETY: the group is alive for the call.
        check("set a time limit", unsafe { ffi::trn_group_set_timeout(self.handle, millis(timeout)) })
    }

    /// The same group, for whoever counts what another owner does.
    #[cfg(test)]
    pub(crate) fn share(&self) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: pointers are valid for the call; the new handle is freed on its own.
        check("share a group", unsafe { ffi::trn_group_share(self.handle, &mut handle) })?;
        Ok(Self { handle, rank: self.rank, world: self.world })
    }

    /// How many collectives this rank has begun, a reducer's among them.
    #[cfg(test)]
    pub(crate) fn begun(&self) -> Result<u64> {
        let mut begun = 0;
        // SAFETY: the group is alive for the call, and the pointer is valid.
        check("count collectives", unsafe { ffi::trn_group_begun(self.handle, &mut begun) })?;
        Ok(begun)
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

    /// Starts to fill `flat`, which has as many equal chunks as there are ranks, with every rank's own: chunk r comes
    /// from rank r. One dimension, contiguous, the same length and type everywhere. Do not write to `flat`, or read
    /// chunks other than the rank's own, before [`Pending::wait`] returns.
    pub fn all_gather(&self, flat: &Tensor) -> Result<Pending> {
        self.gather(flat, ptr::null())
    }

    /// The same, with this rank's chunk in `own`, apart from `flat`: of one dimension, contiguous, of a chunk's length
    /// and type. Do not write to it, either, before [`Pending::wait`] returns.
    pub fn all_gather_from(&self, flat: &Tensor, own: &Tensor) -> Result<Pending> {
        self.gather(flat, ffi::raw(own))
    }

    fn gather(&self, flat: &Tensor, own: *const ffi::AtTensor) -> Result<Pending> {
        let mut handle = ptr::null_mut();
        // SAFETY: pointers are valid for the call, `own` is null or a tensor; the work keeps the tensors' memory.
        check("all-gather", unsafe { ffi::trn_group_all_gather(self.handle, ffi::raw(flat), own, &mut handle) })?;
        Ok(Pending { handle })
    }

    /// Starts to add up chunk r of every rank's `flat` for each rank r, which has as many equal chunks as there are
    /// ranks. [`Reducing::finish`] adds this rank's sum to `into`, of a chunk's length. One dimension, contiguous,
    /// fp32. Do not write to either before. Elements are summed in the order of ranks (Gloo), wherever they lie.
    pub fn reduce_scatter(&self, flat: &Tensor, into: &Tensor) -> Result<Reducing> {
        let mut handle = ptr::null_mut();
        let status =
            // SAFETY: pointers are valid for the call; the exchange keeps the tensors' memory.
            unsafe { ffi::trn_group_reduce_scatter(self.handle, ffi::raw(flat), ffi::raw(into), &mut handle) };
        check("reduce-scatter", status)?;
        Ok(Reducing { handle })
    }

    /// Returns when every rank has called it.
    pub fn barrier(&self) -> Result<()> {
        // SAFETY: the group is alive for the call.
        check("barrier", unsafe { ffi::trn_group_barrier(self.handle) })
    }

    /// Aborts work in flight, so that dropping the group after an error does not wait for a peer: NCCL's kernels would.
    /// Gloo has nothing to abort; its collectives end with a peer's connection or at the time limit. The group is
    /// unusable afterwards.
    pub fn abort(&self) -> Result<()> {
        // SAFETY: the group is alive for the call.
        check("abort the process group", unsafe { ffi::trn_group_abort(self.handle) })
    }

    pub(super) fn handle(&self) -> *const ffi::GroupHandle {
        self.handle
    }
}

/// A collective under way. Dropping it does not wait: the work continues and keeps its resources.
#[derive(Debug)]
#[must_use = "its result is there only after a wait"]
pub struct Pending {
    handle: *mut ffi::PendingHandle,
}

impl Pending {
    /// Returns when the result is there (Gloo), or ordered before all later work of the device's current stream (NCCL).
    pub fn wait(self) -> Result<()> {
        // SAFETY: made by the shim and not freed yet.
        check("wait for a collective", unsafe { ffi::trn_pending_wait(self.handle) })
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once.
        unsafe { ffi::trn_pending_free(self.handle) };
    }
}

/// A reduce-scatter under way. Dropping it does not wait, and adds nothing: the work continues and keeps its resources.
#[derive(Debug)]
#[must_use = "its result is there only after it has finished"]
pub struct Reducing {
    handle: *mut ffi::ReducingHandle,
}

impl Reducing {
    /// Waits for the other ranks' chunks, and adds their sum to where it belongs: on return (Gloo), or before all later
    /// work of the device's current stream (NCCL).
    pub fn finish(self) -> Result<()> {
        // SAFETY: made by the shim and not freed yet.
        check("wait for a reduce-scatter", unsafe { ffi::trn_reducing_finish(self.handle) })
    }
}

impl Drop for Reducing {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once.
        unsafe { ffi::trn_reducing_free(self.handle) };
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once; reducers hold references of their own.
        unsafe { ffi::trn_group_free(self.handle) };
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{sync::mpsc, thread};

    use tch::Kind;

    use super::*;

    pub(crate) const LIMIT: Duration = Duration::from_secs(60);

    /// Runs `body` as every rank of a Gloo group, each on its own thread; returns the results by rank.
    pub(crate) fn ranks<T: Send>(world: u32, limit: Duration, body: impl Fn(ProcessGroup) -> T + Sync) -> Vec<T> {
        let store = Store::serve("127.0.0.1", 0, LIMIT).unwrap();
        let port = store.port();
        // A rank that finishes early must not exit while another still connects.
        let formed = std::sync::Barrier::new(world as usize);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..world)
                .map(|rank| {
                    let (body, formed) = (&body, &formed);
                    scope.spawn(move || {
                        let store = Store::connect("127.0.0.1", port, LIMIT).unwrap();
                        let (rank, world) = (Rank(rank), WorldSize(world));
                        let group = ProcessGroup::new(Backend::Gloo, &store, "test", rank, world, limit, Device::Cpu);
                        formed.wait();
                        body(group.unwrap())
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn all_reduce_sums_over_two_and_three_ranks() {
        for world in [2, 3] {
            let sums = ranks(world, LIMIT, |group| {
                let mut tensor = Tensor::arange(1000, (Kind::Float, Device::Cpu)) + f64::from(group.rank().get());
                group.all_reduce_sum(&mut tensor).unwrap();
                group.barrier().unwrap();
                Vec::<f32>::try_from(tensor).unwrap()
            });
            let extra = (0..world).sum::<u32>();
            let want: Vec<f32> = (0..1000).map(|i| (i * world + extra) as f32).collect();
            assert!(sums.iter().all(|sum| *sum == want), "{world} ranks");
        }
    }

    #[test]
    fn broadcast_gives_everyone_the_roots_tensor() {
        let got = ranks(3, LIMIT, |group| {
            let mut tensor = Tensor::from_slice(&[i64::from(group.rank().get()); 4]);
            assert!(group.broadcast(&mut tensor, Rank(3)).is_err(), "a root outside the world");
            group.broadcast(&mut tensor, Rank(2)).unwrap();
            Vec::<i64>::try_from(tensor).unwrap()
        });
        assert_eq!(got, [[2; 4], [2; 4], [2; 4]]);
    }

    #[test]
    fn an_all_gather_brings_every_rank_every_chunk() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let got = ranks(3, LIMIT, |group| {
                let rank = i64::from(group.rank().get());
                let flats: Vec<_> = (0..3).map(|_| Tensor::full([12], -1.0, (kind, Device::Cpu))).collect();
                let started: Vec<_> = flats
                    .iter()
                    .zip(1..)
                    .map(|(flat, number)| {
                        let _ = flat.narrow(0, 4 * rank, 4).fill_((rank + 10 * number) as f64);
                        group.all_gather(flat).unwrap()
                    })
                    .collect();
                started.into_iter().for_each(|pending| pending.wait().unwrap());
                assert!(group.all_gather(&Tensor::zeros([7], (kind, Device::Cpu))).is_err(), "no three equal chunks");
                flats.iter().map(|flat| Vec::<f32>::try_from(flat.to_kind(Kind::Float)).unwrap()).collect::<Vec<_>>()
            });
            let want: Vec<Vec<f32>> =
                (1..4).map(|number| (0..12).map(|i| (i / 4 + 10 * number) as f32).collect()).collect();
            assert!(got.iter().all(|got| *got == want), "{kind:?}: {got:?}");
        }
    }

    #[test]
    fn a_gather_takes_a_chunk_from_elsewhere_and_one_of_another_length_is_refused() {
        let got = ranks(3, LIMIT, |group| {
            let own = Tensor::full([4], f64::from(group.rank().get()), (Kind::BFloat16, Device::Cpu));
            let flat = Tensor::full([12], -1.0, (Kind::BFloat16, Device::Cpu));
            group.all_gather_from(&flat, &own).unwrap().wait().unwrap();
            assert!(group.all_gather_from(&flat, &own.narrow(0, 0, 3)).is_err());
            assert!(group.all_gather_from(&flat, &own.to_kind(Kind::Float)).is_err());
            Vec::<f32>::try_from(flat.to_kind(Kind::Float)).unwrap()
        });
        assert!(got.iter().all(|got| *got == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2].map(|i| i as f32)), "{got:?}");
    }

    /// Numbers whose sum depends on the order: it is that of ranks, for every chunk.
    #[test]
    fn a_reduce_scatter_adds_each_ranks_chunk_in_the_order_of_ranks() {
        let value = |rank: u32, place: i64| ((rank + 1) as f32).powi(7) * 0.1 / (place + 3) as f32;
        for world in [1, 2, 3, 5] {
            let got = ranks(world, LIMIT, |group| {
                let rank = group.rank().get();
                let flat = |scale: f32| {
                    let values: Vec<f32> = (0..4 * i64::from(world)).map(|at| scale * value(rank, at)).collect();
                    Tensor::from_slice(&values)
                };
                let into = Tensor::ones([4], (Kind::Float, Device::Cpu));
                // Two under way at a time.
                let (flats, other) = ([flat(1.0), flat(-3.0)], Tensor::zeros([4], (Kind::Float, Device::Cpu)));
                let first = group.reduce_scatter(&flats[0], &into).unwrap();
                let second = group.reduce_scatter(&flats[1], &other).unwrap();
                first.finish().unwrap();
                second.finish().unwrap();
                assert!(group.reduce_scatter(&flats[0], &into.narrow(0, 0, 3)).is_err());
                [into, other].map(|tensor| Vec::<f32>::try_from(tensor).unwrap())
            });
            for (rank, [into, other]) in (0..).zip(got) {
                for (at, (one, two)) in (4 * rank..).zip(into.into_iter().zip(other)) {
                    let sum = |scale: f32| (0..world).map(|rank| scale * value(rank, at)).reduce(|a, b| a + b).unwrap();
                    assert_eq!((one, two), (1.0 + sum(1.0), sum(-3.0)), "place {at} on {world} ranks");
                }
            }
        }
    }

    #[test]
    fn every_collective_is_counted() {
        let counts = ranks(2, LIMIT, |group| {
            let zeros = |len: i64| Tensor::zeros([len], (Kind::Float, Device::Cpu));
            let mut counts = vec![group.begun().unwrap()];
            group.all_reduce_sum(&mut zeros(4)).unwrap();
            counts.push(group.begun().unwrap());
            group.broadcast(&mut zeros(4), Rank(1)).unwrap();
            counts.push(group.begun().unwrap());
            let (flat, into) = (zeros(4), zeros(2));
            group.all_gather(&flat).unwrap().wait().unwrap();
            counts.push(group.begun().unwrap());
            group.all_gather_from(&flat, &into).unwrap().wait().unwrap();
            counts.push(group.begun().unwrap());
            group.reduce_scatter(&flat, &into).unwrap().finish().unwrap();
            counts.push(group.begun().unwrap());
            group.barrier().unwrap();
            counts.push(group.begun().unwrap());
            counts
        });
        assert!(counts.iter().all(|counts| counts.windows(2).all(|pair| pair[0] < pair[1])), "{counts:?}");
    }

    #[test]
    fn a_peer_that_leaves_is_an_error_and_not_a_hang() {
        let results = ranks(2, LIMIT, |group| {
            if group.rank() == Rank(1) {
                return Ok(());
            }
            group.all_reduce_sum(&mut Tensor::zeros([8], (Kind::Float, Device::Cpu)))
        });
        let Err(TorchError::Peer { message, .. }) = &results[0] else { panic!("{results:?}") };
        assert!(!message.is_empty());
    }

    #[test]
    fn a_peer_that_hangs_is_an_error_after_the_limit() {
        let (leave, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let results = ranks(2, Duration::from_secs(1), |group| {
            if group.rank() == Rank(1) {
                // Stays connected until the other has its answer.
                let _ = wait.lock().unwrap().recv();
                return Ok(());
            }
            let result = group.all_reduce_sum(&mut Tensor::zeros([8], (Kind::Float, Device::Cpu)));
            leave.send(()).unwrap();
            result
        });
        assert!(matches!(results[0], Err(TorchError::Peer { .. })), "{results:?}");
    }

    #[test]
    fn the_limit_can_be_changed_after_the_group_has_formed() {
        let (leave, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let results = ranks(2, LIMIT, |group| {
            group.set_timeout(Duration::from_secs(1)).unwrap();
            if group.rank() == Rank(1) {
                let _ = wait.lock().unwrap().recv_timeout(LIMIT / 2);
                return Ok(());
            }
            let result = group.all_reduce_sum(&mut Tensor::zeros([8], (Kind::Float, Device::Cpu)));
            leave.send(()).unwrap();
            result
        });
        let Err(TorchError::Peer { message, .. }) = &results[0] else { panic!("{results:?}") };
        assert!(message.contains("1000ms"), "not the first limit: {message}");
        // A longer one counts, too.
        let results = ranks(2, LIMIT, |group| {
            group.set_timeout(Duration::from_millis(1)).unwrap();
            group.set_timeout(LIMIT).unwrap();
            group.barrier()
        });
        assert!(results.iter().all(Result::is_ok), "{results:?}");
    }

    #[test]
    fn a_group_that_cannot_form_is_an_error() {
        let store = Store::serve("127.0.0.1", 0, LIMIT).unwrap();
        let form = |backend, rank, device| {
            let limit = Duration::from_secs(1);
            ProcessGroup::new(backend, &store, "p", Rank(rank), WorldSize(2), limit, device).unwrap_err()
        };
        let error = form(Backend::Gloo, 0, Device::Cpu);
        assert!(matches!(error, TorchError::Peer { .. }), "nobody else came: {error}");
        assert!(matches!(form(Backend::Gloo, 2, Device::Cpu), TorchError::Number { .. }));
        assert!(matches!(form(Backend::Nccl, 0, Device::Cpu), TorchError::NoNccl));
        assert_eq!(Backend::for_device(Device::Cuda(0), false), Backend::Nccl);
        assert_eq!(Backend::for_device(Device::Cuda(0), true), Backend::Gloo);
    }

    #[test]
    fn a_group_can_be_given_up_and_dropped() {
        let results = ranks(2, LIMIT, |group| {
            group.barrier().unwrap();
            group.abort()
        });
        assert!(results.iter().all(Result::is_ok), "{results:?}");
    }

    #[test]
    fn what_libtorch_refuses_arrives_as_a_readable_error() {
        let errors = ranks(1, LIMIT, |group| {
            let mut strided = Tensor::zeros([4, 6], (Kind::Float, Device::Cpu)).transpose(0, 1);
            group.all_reduce_sum(&mut strided).unwrap_err()
        });
        let text = errors[0].to_string();
        assert!(matches!(errors[0], TorchError::Refused { .. }), "{text}");
        assert!(text.starts_with("all-reduce: ") && text.contains("contiguous"), "{text}");
        assert!(!text.contains("frame #"), "a backtrace of LibTorch: {text}");
    }

    #[test]
    fn a_dead_port_is_an_error_in_time() {
        // Bound, but without a listener: no other process gets the port meanwhile.
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = std::net::SocketAddr::try_from(rustix::net::getsockname(&socket).unwrap()).unwrap();
        let error = Store::connect("127.0.0.1", address.port(), Duration::from_secs(1)).unwrap_err();
        assert!(matches!(error, TorchError::Peer { .. }), "{error}");
        assert!(error.to_string().starts_with("connect to the rendezvous store: "), "{error}");
    }

    #[test]
    fn the_store_of_a_run_on_one_machine_is_not_open_to_the_outside() {
        let store = Store::serve("127.0.0.1", 0, LIMIT).unwrap();
        assert!(store.local_address().unwrap().is_loopback());
        // The port is free on another loopback address: the store is bound only to its own.
        TcpListener::bind(("127.0.0.2", store.port())).unwrap();
        // An unused address (RFC 5737) and the wildcard address: neither may be served at another address instead.
        for host in ["no such host", "192.0.2.1", "0.0.0.0", "::"] {
            assert!(Store::serve(host, 0, LIMIT).is_err(), "{host}");
        }
        assert!(Store::connect("nul\0host", 1, LIMIT).is_err());
    }
}
