//! The address at which other nodes reach this one.
//!
//! `automatic` is the source address of the route to the store: the machines of one run all reach that store, and what
//! they use for it is an address of the network that they share. Whether it leads here is found out by a dial of this
//! node's own port ([`answers`]): a firewall, a namespace or a translated address shows before a peer is told.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use url::Url;

use super::{dial::dial, end::End, identity::LocalNode, settings::LinkSettings};
use crate::config::undialable;

/// Where no packet goes and for which the routing table has the default route: documentation's addresses (RFC 5737,
/// RFC 3849). Stands for a store that has no address of its own.
const ELSEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];
/// The port in a question to the routing table; it plays no part.
const ANY_PORT: u16 = 9;

/// No address was found.
#[derive(Debug, thiserror::Error)]
pub enum NoAddress {
    /// The store's host has no address.
    #[error("the store's host {host} has no address")]
    Unknown {
        /// The host.
        host: String,
        /// The resolver's reason.
        source: io::Error,
    },
    /// No route gave an address that others can dial.
    #[error("no address that other nodes can dial: {0}; set network.address")]
    Unusable(String),
}

/// An address, and why this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The address.
    pub address: IpAddr,
    /// The reason, for a log or a report.
    pub reason: String,
}

/// The host and port of a store's endpoint; `None`: a store without one, such as a folder.
pub fn host_and_port(endpoint: &Url) -> Option<(String, u16)> {
    let host = match endpoint.host()? {
        url::Host::Domain("") => return None,
        url::Host::Domain(name) => name.to_owned(),
        url::Host::Ipv4(address) => address.to_string(),
        url::Host::Ipv6(address) => address.to_string(),
    };
    Some((host, endpoint.port_or_known_default()?))
}

/// The source address of the route to `toward`. Connecting a datagram socket sends nothing.
pub fn source_toward(toward: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if toward.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(toward)?;
    Ok(socket.local_addr()?.ip())
}

/// The first of `routes` (where to, and the source or the system's refusal) that gives an address which others can
/// dial. Loopback counts: a store on loopback has all its nodes on this machine.
pub fn choose(routes: &[(SocketAddr, Result<IpAddr, String>)]) -> Result<Choice, NoAddress> {
    let mut refused = Vec::new();
    for (toward, source) in routes {
        let why = match source {
            Ok(address) => match undialable(*address) {
                None => {
                    let reason = format!("source address of the route to {}", toward.ip());
                    return Ok(Choice { address: *address, reason });
                }
                Some(why) => format!("{address} toward {}: {why}", toward.ip()),
            },
            Err(why) => format!("no route to {}: {why}", toward.ip()),
        };
        refused.push(why);
    }
    Err(NoAddress::Unusable(refused.join("; ")))
}

/// `network.address = "auto"`: by the route to the store's endpoint, or, for a store without one, by the default route,
/// or, on a machine without a network, loopback.
pub async fn automatic(endpoint: Option<&Url>) -> Result<Choice, NoAddress> {
    let asked = |toward: SocketAddr| (toward, source_toward(toward).map_err(|error| error.to_string()));
    match endpoint.and_then(host_and_port) {
        Some((host, port)) => {
            let found = tokio::net::lookup_host((host.clone(), port)).await;
            let found = found.map_err(|source| NoAddress::Unknown { host, source })?;
            choose(&found.map(asked).collect::<Vec<_>>())
        }
        None => {
            let routes = ELSEWHERE.map(|address| asked(SocketAddr::new(address, ANY_PORT)));
            Ok(choose(&routes).unwrap_or_else(|none| Choice {
                address: Ipv4Addr::LOCALHOST.into(),
                reason: format!("this machine has no network: {none}"),
            }))
        }
    }
}

/// Dials this node's own listener at `address`. `Ok`: what others will dial leads to this very process, shown by its
/// key. It takes [`LinkSettings::handshake`] at most.
pub async fn answers(address: SocketAddr, me: &LocalNode, settings: LinkSettings) -> Result<(), End> {
    dial::<(), ()>(address, &me.as_peer(), me, settings).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(text: &str) -> SocketAddr {
        SocketAddr::new(text.parse().unwrap(), 443)
    }

    #[test]
    fn the_first_route_that_others_can_use_is_chosen_and_named() {
        let route = |toward: &str, source: Result<&str, &str>| {
            (to(toward), source.map(|text| text.parse().unwrap()).map_err(str::to_owned))
        };
        let routes = [
            route("2001:db8::9", Err("network is unreachable")),
            route("fe80::9", Ok("fe80::1")),
            route("169.254.0.9", Ok("169.254.0.1")),
            route("10.0.0.9", Ok("10.0.0.1")),
            route("10.0.0.8", Ok("10.0.0.2")),
        ];
        let choice = choose(&routes).unwrap();
        assert_eq!(choice.address, to("10.0.0.1").ip());
        assert_eq!(choice.reason, "source address of the route to 10.0.0.9");
        assert_eq!(choose(&[route("127.0.0.1", Ok("127.0.0.1"))]).unwrap().address, to("127.0.0.1").ip());

        let none = choose(&routes[..3]).unwrap_err().to_string();
        for part in ["2001:db8::9: network is unreachable", "fe80::1", "169.254.0.1", "network.address"] {
            assert!(none.contains(part), "{part}: {none}");
        }
    }

    #[test]
    fn addresses_that_nobody_can_dial() {
        for bad in ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "169.254.1.1", "fe80::1", "255.255.255.255"] {
            assert!(undialable(bad.parse().unwrap()).is_some(), "{bad}");
        }
        for good in ["127.0.0.1", "::1", "10.0.0.1", "203.0.113.9", "fd00::1", "2001:db8::1"] {
            assert_eq!(undialable(good.parse().unwrap()), None, "{good}");
        }
    }

    #[test]
    fn the_endpoint_of_a_store() {
        let of = |text: &str| host_and_port(&Url::parse(text).unwrap());
        assert_eq!(of("https://s3.eu-west-1.amazonaws.com"), Some(("s3.eu-west-1.amazonaws.com".into(), 443)));
        assert_eq!(of("http://10.0.0.5:9000/bucket"), Some(("10.0.0.5".into(), 9000)));
        assert_eq!(of("http://[::1]:9000"), Some(("::1".into(), 9000)));
        assert_eq!(of("file:///mnt/store"), None);
        assert_eq!(of("memory:///"), None);
    }

    #[tokio::test]
    async fn a_store_on_loopback_gives_loopback_and_a_folder_the_default_route() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Url::parse(&format!("http://{}", server.local_addr().unwrap())).unwrap();
        let choice = automatic(Some(&endpoint)).await.unwrap();
        assert_eq!(choice.address, to("127.0.0.1").ip());
        let folder = automatic(Some(&Url::parse("file:///mnt").unwrap())).await.unwrap();
        assert_eq!(folder, automatic(None).await.unwrap());
        assert_eq!(undialable(folder.address), None, "{}", folder.reason);
        let nowhere = automatic(Some(&Url::parse("http://no-such-host.invalid").unwrap())).await.unwrap_err();
        assert!(matches!(&nowhere, NoAddress::Unknown { host, .. } if host == "no-such-host.invalid"), "{nowhere}");
    }
}
