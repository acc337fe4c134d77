//! The hosts that are never reached through a proxy: this machine and its own metadata services.
//!
//! `HTTP_PROXY` holds for every client that reads it, unless `NO_PROXY` names the host. But a proxy would answer for
//! its own machine: its loopback, its metadata service, its role. So loopback, link-local addresses and the metadata
//! services' names are always reached directly. AWS's clients take their connections from here, and the store's clients
//! ask here which way to use.

use std::net::{IpAddr, Ipv6Addr};

use aws_smithy_http_client::{Builder, ConnectorBuilder, proxy::ProxyConfig, tls};
use aws_smithy_runtime_api::client::{
    http::{
        HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
    },
    orchestrator::HttpRequest,
    runtime_components::RuntimeComponents,
};
use url::Url;

/// The names of those metadata services that have one.
const NAMES: [&str; 3] = ["localhost", "metadata.google.internal", "metadata"];
/// AWS's own services at unique local addresses: instance metadata, and the credentials of EKS.
const AWS_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0);

/// Whether `host`, a name or an address (in brackets or not), is never reached through a proxy.
pub fn is_asked_straight(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => address.is_loopback() || address.is_link_local(),
        Ok(IpAddr::V6(address)) => {
            let of_aws = address.segments()[..2] == AWS_IPV6.segments()[..2];
            let mapped = address.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback() || v4.is_link_local());
            address.is_loopback() || address.is_unicast_link_local() || of_aws || mapped
        }
        Err(_) => {
            let host = host.trim_end_matches('.');
            NAMES.iter().any(|name| host.eq_ignore_ascii_case(name))
        }
    }
}

/// Connections for AWS's clients: through the environment's proxy, or direct.
#[derive(Debug)]
struct Lines {
    proxied: SharedHttpClient,
    straight: SharedHttpClient,
}

#[derive(Debug)]
struct Line {
    proxied: SharedHttpConnector,
    straight: SharedHttpConnector,
}

impl HttpClient for Lines {
    fn http_connector(&self, settings: &HttpConnectorSettings, components: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(Line {
            proxied: self.proxied.http_connector(settings, components),
            straight: self.straight.http_connector(settings, components),
        })
    }
}

impl HttpConnector for Line {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let url = Url::parse(request.uri()).ok();
        if url.as_ref().and_then(Url::host_str).is_some_and(is_asked_straight) {
            self.straight.call(request)
        } else {
            self.proxied.call(request)
        }
    }
}

/// The HTTP client of AWS's clients.
pub fn sdk_client() -> SharedHttpClient {
    let client = |proxies: fn() -> ProxyConfig| {
        Builder::new().build_with_connector_fn(move |settings, components| {
            let tls = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc);
            let mut connector = ConnectorBuilder::default().tls_provider(tls);
            connector.set_connector_settings(settings.cloned());
            connector.set_sleep_impl(components.and_then(RuntimeComponents::sleep_impl));
            connector.set_proxy_config(Some(proxies()));
            connector.build()
        })
    };
    let lines = Lines { proxied: client(ProxyConfig::from_env), straight: client(ProxyConfig::disabled) };
    SharedHttpClient::new(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_and_its_metadata_are_reached_directly() {
        for host in [
            "127.0.0.1",
            "127.8.8.8",
            "localhost",
            "LOCALHOST",
            "[::1]",
            "::1",
            "169.254.169.254",
            "169.254.170.2",
            "169.254.170.23",
            "[fd00:ec2::254]",
            "[fd00:ec2::23]",
            "[fe80::1]",
            "[::ffff:169.254.169.254]",
            "metadata.google.internal",
            "metadata.google.internal.",
        ] {
            assert!(is_asked_straight(host), "{host}");
        }
        for host in [
            "s3.eu-central-1.amazonaws.com",
            "10.0.0.1",
            "168.63.129.16",
            "[fd00::1]",
            "[2001:db8::1]",
            "localhost.example.com",
            "metadata.example.com",
            "",
        ] {
            assert!(!is_asked_straight(host), "{host}");
        }
    }
}
