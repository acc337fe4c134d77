//! Single calls of AWS's services, for which a crate of their own would take longer to compile than all that calls
//! them: SSM, Service Quotas, Auto Scaling, and what is asked of EC2 and ECR before machines are started.
//!
//! The SDK's own runtime carries a call: credentials and their cache, Signature Version 4, connections ([`direct`]),
//! time-outs, and the retries of its standard mode (with jitter; after throttling, after 500, 502, 503 and 504, after a
//! broken connection or answer, and, signed with the service's time, after a refusal that shows this machine's clock to
//! be wrong). Only what a service's crate would add stands here: where the service is ([`endpoint`]), and what requests
//! and answers look like ([`answer`]), in AWS JSON 1.1 and in Query.
//!
//! Nothing is stored. A client may be used by several tasks at once. A call that fails or is dropped may have happened:
//! which ones may be repeated is for the caller to know, as the retries here repeat every one. An answer has at most
//! [`LARGEST`] bytes; a longer one counts as broken. Answers may be secrets: no log line and no error has their text,
//! except a refusal's code and message.
//!
//! [`direct`]: super::direct
mod answer;
mod endpoint;

use std::{error::Error as StdError, fmt};

use aws_config::{SdkConfig, retry::RetryConfig, timeout::TimeoutConfig};
use aws_runtime::{
    auth::{
        SigV4OperationSigningConfig,
        sigv4::{SCHEME_ID, SigV4AuthScheme},
    },
    invocation_id::InvocationIdInterceptor,
    request_info::RequestInfoInterceptor,
    retries::classifiers::AwsErrorCodeClassifier,
    service_clock_skew::{DisableClockSkewCorrection, ServiceClockSkewClassifier, ServiceClockSkewInterceptor},
    user_agent::{ApiMetadata, UserAgentInterceptor},
};
use aws_smithy_runtime::client::{
    http::connection_poisoning::ConnectionPoisoningInterceptor,
    orchestrator::operation::Operation,
    retries::classifiers::{HttpStatusCodeClassifier, TransientErrorClassifier},
};
use aws_smithy_runtime_api::{
    box_error::BoxError,
    client::{
        auth::{AuthSchemeOptionResolverParams, static_resolver::StaticAuthSchemeOptionResolver},
        endpoint::{EndpointFuture, EndpointResolverParams, ResolveEndpoint},
        interceptors::{Intercept, context::BeforeDeserializationInterceptorContextMut},
        orchestrator::{HttpRequest, HttpResponse, OrchestratorError, SensitiveOutput},
        result::SdkError,
        runtime_components::{RuntimeComponents, RuntimeComponentsBuilder},
        runtime_plugin::StaticRuntimePlugin,
    },
};
use aws_smithy_types::{
    body::SdkBody,
    config_bag::{ConfigBag, Layer},
    endpoint::Endpoint,
    error::ErrorMetadata,
};
use aws_types::service_config::ServiceConfigKey;
use bytes::Bytes;
use http_body_util::Limited;
use serde::de::DeserializeOwned;
use url::form_urlencoded;

pub(super) use answer::{Items, Members};
use endpoint::Wanted;

use super::aws::Failure;

/// The most bytes of an answer. SSM's largest page has ten values of 8 KiB.
const LARGEST: usize = 1 << 20;

/// A service.
#[derive(Debug)]
pub struct Service {
    /// Its id in AWS's models; `AWS_ENDPOINT_URL_<ID>` and the profile's `services` name it so.
    id: &'static str,
    /// How its host names begin.
    host: &'static str,
    /// Its name in signatures.
    name: &'static str,
    /// The beginning of a JSON target, or a Query API's version.
    api: &'static str,
}

/// Systems Manager.
pub const SSM: Service = Service { id: "SSM", host: "ssm", name: "ssm", api: "AmazonSSM" };
/// Service Quotas.
pub const QUOTAS: Service =
    Service { id: "Service Quotas", host: "servicequotas", name: "servicequotas", api: "ServiceQuotasV20190624" };
/// EC2 Auto Scaling.
pub const AUTO_SCALING: Service =
    Service { id: "Auto Scaling", host: "autoscaling", name: "autoscaling", api: "2011-01-01" };

/// EC2.
pub const EC2: Service = Service { id: "EC2", host: "ec2", name: "ec2", api: "2016-11-15" };
/// Identity and Access Management.
pub const IAM: Service = Service { id: "IAM", host: "iam", name: "iam", api: "2010-05-08" };
/// Simple Notification Service.
pub const SNS: Service = Service { id: "SNS", host: "sns", name: "sns", api: "2010-03-31" };
/// EC2's registry of images.
pub const ECR: Service =
    Service { id: "ECR", host: "api.ecr", name: "ecr", api: "AmazonEC2ContainerRegistry_V20150921" };

/// A service in a region, with this process's credentials. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    service: &'static Service,
    operation: Operation<Request, Answer, ErrorMetadata>,
}

#[derive(Debug)]
struct Request {
    content: &'static str,
    target: Option<String>,
    body: String,
}

/// The body of a result.
struct Answer(Bytes);

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Answer({} bytes)", self.0.len())
    }
}

impl Client {
    /// A client as `config` says. What `timeouts` and `retries` leave open is taken from there, too. No request is
    /// made.
    pub fn new(
        config: &SdkConfig,
        service: &'static Service,
        mut timeouts: TimeoutConfig,
        retries: Option<RetryConfig>,
    ) -> Self {
        if let Some(general) = config.timeout_config() {
            timeouts.take_defaults_from(general);
        }
        let retries = retries.or_else(|| config.retry_config().cloned()).unwrap_or_else(RetryConfig::standard);
        let region = config.region().cloned();
        let place = Place {
            service,
            wanted: Wanted {
                region: region.as_ref().map(ToString::to_string),
                url: url_of(config, service),
                fips: config.use_fips().unwrap_or_default(),
                dual_stack: config.use_dual_stack().unwrap_or_default(),
            },
        };
        let mut settings = Layer::new("call");
        settings.store_put(AuthSchemeOptionResolverParams::new(()));
        settings.store_put(EndpointResolverParams::new(()));
        settings.store_put(SigV4OperationSigningConfig {
            region: region.map(Into::into),
            name: Some(service.name.into()),
            ..SigV4OperationSigningConfig::default()
        });
        settings.store_put(SensitiveOutput);
        settings.store_put(ApiMetadata::new(service.name, env!("CARGO_PKG_VERSION")));
        settings.store_or_unset(config.app_name().cloned());
        settings.store_or_unset(config.disable_clock_skew_correction().map(DisableClockSkewCorrection::from));
        settings.store_put(timeouts);
        settings.store_put(retries);
        let mut parts = RuntimeComponentsBuilder::new("call")
            .with_http_client(config.http_client())
            .with_time_source(config.time_source())
            .with_sleep_impl(config.sleep_impl())
            .with_identity_cache(config.identity_cache())
            .with_auth_scheme(SigV4AuthScheme::new())
            .with_auth_scheme_option_resolver(Some(StaticAuthSchemeOptionResolver::new(vec![SCHEME_ID])))
            .with_endpoint_resolver(Some(place))
            .with_retry_classifier(HttpStatusCodeClassifier::default())
            .with_retry_classifier(TransientErrorClassifier::<ErrorMetadata>::new())
            .with_retry_classifier(AwsErrorCodeClassifier::<ErrorMetadata>::new())
            .with_retry_classifier(ServiceClockSkewClassifier::<ErrorMetadata>::new())
            .with_interceptor(ConnectionPoisoningInterceptor::new())
            .with_interceptor(ServiceClockSkewInterceptor::new())
            .with_interceptor(RequestInfoInterceptor::new())
            .with_interceptor(UserAgentInterceptor::new())
            .with_interceptor(InvocationIdInterceptor::new())
            .with_interceptor(Shortened);
        if let Some(credentials) = config.credentials_provider() {
            parts.set_identity_resolver(SCHEME_ID, credentials);
        }
        let operation = Operation::builder()
            .service_name(service.name)
            .operation_name("call")
            .runtime_plugin(StaticRuntimePlugin::new().with_config(settings.freeze()).with_runtime_components(parts))
            .serializer(written)
            .deserializer(sorted)
            .build();
        Self { service, operation }
    }

    /// Calls an operation of a service that speaks JSON.
    pub async fn json<A: DeserializeOwned>(&self, action: &str, request: &serde_json::Value) -> Result<A, Failure> {
        let target = Some(format!("{}.{action}", self.service.api));
        let request = Request { content: "application/x-amz-json-1.1", target, body: request.to_string() };
        answer::json(&self.send(request).await?.0)
    }

    /// Calls an action of a service that speaks forms and XML.
    pub async fn query<A: DeserializeOwned>(&self, action: &str, parameters: &[(&str, &str)]) -> Result<A, Failure> {
        let body = form(&[("Action", action), ("Version", self.service.api)], parameters);
        let request = Request { content: "application/x-www-form-urlencoded", target: None, body };
        answer::xml(&format!("{action}Response"), &self.send(request).await?.0)
    }

    async fn send(&self, request: Request) -> Result<Answer, Failure> {
        self.operation.invoke(request).await.map_err(failure)
    }
}

/// The endpoint that the configuration names for this service, or for all: as the SDK's crates have it.
fn url_of(config: &SdkConfig, service: &Service) -> Option<String> {
    let general = || config.endpoint_url().map(str::to_owned);
    if config.get_origin("endpoint_url").is_client_config() {
        return general();
    }
    let key = ServiceConfigKey::builder().service_id(service.id).env("AWS_ENDPOINT_URL").profile("endpoint_url");
    let own = key.build().ok().and_then(|key| config.service_config()?.load_config(key));
    own.or_else(general)
}

#[derive(Debug)]
struct Place {
    service: &'static Service,
    wanted: Wanted,
}

impl ResolveEndpoint for Place {
    fn resolve_endpoint<'a>(&'a self, _: &'a EndpointResolverParams) -> EndpointFuture<'a> {
        let url = endpoint::url(self.service.host, &self.wanted);
        EndpointFuture::ready(url.map(|url| Endpoint::builder().url(url).build()).map_err(BoxError::from))
    }
}

/// Ends an answer that is too long.
#[derive(Debug)]
struct Shortened;

impl Intercept for Shortened {
    fn name(&self) -> &'static str {
        "Shortened"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let body = context.response_mut().body_mut();
        let whole = std::mem::replace(body, SdkBody::taken());
        *body = SdkBody::from_body_1_x(Limited::new(whole, LARGEST));
        Ok(())
    }
}

fn form(first: &[(&str, &str)], then: &[(&str, &str)]) -> String {
    form_urlencoded::Serializer::new(String::new()).extend_pairs(first).extend_pairs(then).finish()
}

fn written(request: Request) -> Result<HttpRequest, BoxError> {
    let mut written = HttpRequest::new(SdkBody::from(request.body));
    written.set_method("POST")?;
    written.set_uri("/")?;
    let length = written.body().bytes().map_or(0, <[u8]>::len).to_string();
    let headers = written.headers_mut();
    headers.insert("content-type", request.content);
    headers.insert("content-length", length);
    if let Some(target) = request.target {
        headers.insert("x-amz-target", target);
    }
    Ok(written)
}

fn sorted(response: &HttpResponse) -> Result<Answer, OrchestratorError<ErrorMetadata>> {
    let body = response.body().bytes().unwrap_or_default();
    if response.status().is_success() {
        return Ok(Answer(Bytes::copy_from_slice(body)));
    }
    let kind = response.headers().get("x-amzn-errortype");
    Err(OrchestratorError::operation(answer::refusal(kind, body)))
}

/// Without the answer's text, which the SDK's own words would repeat.
fn failure(error: SdkError<ErrorMetadata, HttpResponse>) -> Failure {
    match &error {
        SdkError::ServiceError(refused) if refused.err().code().is_none() => {
            Failure::Other(format!("status {} without a code", refused.raw().status().as_u16()))
        }
        SdkError::ResponseError(_) => {
            let (mut text, mut cause) = (error.to_string(), error.source());
            while let Some(deeper) = cause {
                text = format!("{text}: {deeper}");
                cause = deeper.source();
            }
            Failure::Other(text)
        }
        _ => Failure::from(error),
    }
}

#[cfg(test)]
mod tests;
