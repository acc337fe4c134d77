//! What must be there before machines are started on AWS: their type in the subnets' zones, a way out of each subnet,
//! the image that they run, the driver of their machine image, and what they read at their start.

use super::{account::Machines, verdict::Line, within};
use crate::{
    cloud::{
        ami::{self, MachineImage},
        network::{Network, Subnet, WayOut},
        permission::{self, Decision},
        region,
        registry::{self, ImageName},
    },
    error::{Error, Kind, Result},
    report::human,
    storage::Store,
};

const OFFERED: &str = "offered type";
const WAY_OUT: &str = "way out";
const IMAGE: &str = "image";
const MACHINE_IMAGE: &str = "machine image";
const READS: &str = "configuration read";
/// The least driver that knows CUDA 13.
const DRIVER: u32 = 580;

/// The lines about everything that is named.
pub(super) async fn look(wanted: &Machines) -> Vec<Line> {
    let reads = futures::future::join_all(wanted.reads.iter().map(|uri| within(READS, reads(wanted, uri))));
    let (subnets, image, ami, reads) = tokio::join!(subnets(wanted), image(wanted), machine_image(wanted), reads);
    subnets.into_iter().chain(image).chain(ami).chain(reads).collect()
}

async fn machine_image(wanted: &Machines) -> Option<Line> {
    let named = wanted.ami.as_deref()?;
    let look = async {
        let Some(region) = region_of(wanted).await else {
            return Line::warn(MACHINE_IMAGE, "not known: no region is named", "give --region, or set AWS_REGION");
        };
        match ami::look(&region, named).await {
            Ok(image) => fit(&image),
            Err(error) => Line::error(MACHINE_IMAGE, &error),
        }
    };
    Some(within(MACHINE_IMAGE, look).await)
}

/// Whether a machine image can run the program.
fn fit(image: &MachineImage) -> Line {
    let MachineImage { id, name, architecture, root_device, disk_gib, driver } = image;
    let disk = match (root_device, disk_gib) {
        (Some(device), Some(gib)) => format!(", root {device} of {gib} GiB"),
        (Some(device), None) => format!(", root {device}"),
        (None, _) => String::new(),
    };
    let found = format!("{id}, {name}{disk}");
    if architecture != "x86_64" {
        let todo = "the program is built for x86-64: choose another machine image";
        return Line::fail(MACHINE_IMAGE, Kind::Config, format!("{found}: it is for {architecture}"), todo);
    }
    match driver {
        Some(driver) if *driver < DRIVER => {
            let found = format!("{found}: its NVIDIA driver is {driver}");
            Line::fail(MACHINE_IMAGE, Kind::Config, found, format!("CUDA 13 needs {DRIVER} or newer: use a newer one"))
        }
        Some(driver) => Line::ok(MACHINE_IMAGE, format!("{found}, NVIDIA driver {driver}")),
        None => Line::warn(
            MACHINE_IMAGE,
            format!("{found}; driver not checked: neither its name nor its description has a number"),
            format!(
                "look into its release notes: CUDA 13 needs {DRIVER} or newer; a machine with an older one says so"
            ),
        ),
    }
}

/// Whether machines can read an object: by the policies of their role, and, as far as it goes, by reading it.
async fn reads(wanted: &Machines, uri: &str) -> Line {
    let Some((folder, name)) = uri.rsplit_once('/').filter(|(_, name)| uri.contains("://") && !name.is_empty()) else {
        return Line::fail(READS, Kind::Usage, format!("{uri} is no object's URI"), "write s3://bucket/run.toml");
    };
    let there = async { Store::open(folder, &super::LIMITS)?.head(name).await.map_err(Error::from) }.await;
    let bucket = uri.strip_prefix("s3://").and_then(|rest| rest.split_once('/'));
    match (&wanted.role, bucket) {
        (Some(role), Some((bucket, key))) => {
            let object = permission::object(role, bucket, key);
            match permission::simulate(role, "s3:GetObject", &object).await {
                Ok(decision) => readable(uri, role, decision, there.map(drop)),
                Err(error) => Line::error(READS, &error),
            }
        }
        (role, _) => match there {
            Ok(_) => {
                let whose = if role.is_some() { "the role of another cloud" } else { "no --role is named" };
                let found = format!("{uri} is there, and these credentials read it; machines not checked: {whose}");
                Line::warn(READS, found, "on AWS, name their role: --role arn:aws:iam::…:role/…")
            }
            Err(error) => Line::error(READS, &error),
        },
    }
}

/// What the role's policies say, and what was found with these credentials.
fn readable(uri: &str, role: &str, decision: Decision, there: Result<()>) -> Line {
    match (decision, there) {
        (Decision::Allowed, Ok(())) => Line::ok(READS, format!("{uri} is there, and the role may read it")),
        (Decision::Allowed, Err(error)) if error.kind() == Kind::Permission => {
            let found = format!("the role may read {uri}; whether it is there is not known: {error}");
            Line::warn(READS, found, "look with other credentials, such as the role's own")
        }
        (Decision::Allowed, Err(error)) => Line::error(READS, &error),
        (Decision::Denied, _) => {
            let found = format!("a policy denies s3:GetObject of {uri} to {role}");
            Line::fail(READS, Kind::Permission, found, "change that policy, or put the object elsewhere")
        }
        (Decision::Unsaid, _) => {
            let found = format!("no policy of {role} allows s3:GetObject of {uri}");
            let todo = "put it into the stack's bucket, or name its bucket as ReadBucket";
            Line::fail(READS, Kind::Permission, found, todo)
        }
    }
}

/// The region of the wanted machines.
async fn region_of(wanted: &Machines) -> Option<String> {
    if wanted.region.is_some() {
        return wanted.region.clone();
    }
    region::find().await.map(|(name, _)| name)
}

async fn subnets(wanted: &Machines) -> Vec<Line> {
    if wanted.subnets.is_empty() {
        return Vec::new();
    }
    let Some(region) = region_of(wanted).await else {
        return vec![Line::warn(WAY_OUT, "not known: no region is named", "give --region, or set AWS_REGION")];
    };
    let network = Network::open(&region).await;
    let found = match network.subnets(&wanted.subnets).await {
        Ok(found) => found,
        Err(error) => return vec![Line::error(WAY_OUT, &error)],
    };
    let offered = async {
        let instance_type = wanted.instance_type.as_deref()?;
        let look = async {
            match network.zones(instance_type).await {
                Ok(zones) => offered(instance_type, &region, &found, &zones),
                Err(error) => Line::error(OFFERED, &error),
            }
        };
        Some(within(OFFERED, look).await)
    };
    offered.await.into_iter().chain([way_out(&found)]).collect()
}

/// Whether the subnets' zones have machines of a type at all.
fn offered(instance_type: &str, region: &str, subnets: &[Subnet], zones: &[String]) -> Line {
    let (with, without): (Vec<&Subnet>, Vec<&Subnet>) = subnets.iter().partition(|subnet| zones.contains(&subnet.zone));
    let names = |subnets: &[&Subnet]| {
        let each = subnets.iter().map(|subnet| format!("{} ({})", subnet.id, subnet.zone));
        each.collect::<Vec<_>>().join(", ")
    };
    if zones.is_empty() {
        let found = format!("{region} has no {instance_type}");
        return Line::fail(OFFERED, Kind::Config, found, "choose another type, or another region");
    }
    let others = || format!("use subnets in {}, or another type", zones.join(", "));
    if with.is_empty() {
        let found = format!("{instance_type} is offered in none of these subnets: {}", names(&without));
        return Line::fail(OFFERED, Kind::Config, found, others());
    }
    if without.is_empty() {
        return Line::ok(OFFERED, format!("{instance_type} is offered in {}", names(&with)));
    }
    let found = format!("{instance_type} is offered in {}, but not in {}", names(&with), names(&without));
    Line::warn(OFFERED, found, others())
}

/// Whether machines reach the rest of the world: they fetch their image and reach the store.
fn way_out(subnets: &[Subnet]) -> Line {
    let those = |fits: &dyn Fn(&Subnet) -> bool| {
        let names: Vec<&str> = subnets.iter().filter(|subnet| fits(subnet)).map(|subnet| subnet.id.as_str()).collect();
        Some(names.join(", ")).filter(|names| !names.is_empty())
    };
    if let Some(closed) = those(&|subnet| subnet.way == WayOut::Closed) {
        return Line::fail(
            WAY_OUT,
            Kind::Config,
            format!("no default route leads out of {closed}"),
            "use public subnets (aws ec2 describe-subnets --filters Name=default-for-az,Values=true), or add a route \
             to an internet gateway or a NAT gateway",
        );
    }
    if let Some(bare) = those(&|subnet| subnet.way == WayOut::Gateway && !subnet.gives_addresses) {
        return Line::warn(
            WAY_OUT,
            format!("{bare}: an internet gateway, but machines get no public address by themselves"),
            "the launch template must ask for one (AssociatePublicIpAddress), as the stack in userdata/ does",
        );
    }
    let way = |subnet: &Subnet| match &subnet.way {
        WayOut::Through(target) => format!("{} through {target}", subnet.id),
        WayOut::Gateway | WayOut::Closed => format!("{} through an internet gateway", subnet.id),
    };
    Line::ok(WAY_OUT, subnets.iter().map(way).collect::<Vec<_>>().join(", "))
}

async fn image(wanted: &Machines) -> Option<Line> {
    let text = wanted.image.as_deref()?;
    let Some(name) = ImageName::read(text) else {
        return Some(Line::skipped(IMAGE, format!("{text} is not in Amazon's registry: nothing is known of it here")));
    };
    let look = async {
        let region = region_of(wanted).await;
        match registry::size(&name).await {
            Ok(bytes) => shown(&name, bytes, region.as_deref()),
            Err(error) => Line::error(IMAGE, &error),
        }
    };
    Some(within(IMAGE, look).await)
}

/// An image that is there.
fn shown(name: &ImageName, bytes: Option<u64>, region: Option<&str>) -> Line {
    let size = bytes.map_or_else(|| "there".to_owned(), |bytes| format!("there, {} to fetch", human::bytes(bytes)));
    if let Some(region) = region.filter(|region| *region != name.region()) {
        let found = format!("{size}, but in {}, while the machines are in {region}", name.region());
        let todo = format!("push it to {region}: every start of a machine fetches it from there");
        return Line::warn(IMAGE, found, todo);
    }
    if name.may_change() {
        let found = format!("{size}; its tag may be given to another image");
        return Line::warn(IMAGE, found, "name it by its digest (…@sha256:…), as scripts/publish-image prints it");
    }
    Line::ok(IMAGE, size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::verdict::Verdict;

    fn subnet(id: &str, zone: &str, way: WayOut) -> Subnet {
        Subnet { id: id.into(), zone: zone.into(), gives_addresses: true, way }
    }

    #[test]
    fn a_type_must_be_offered_where_the_subnets_are() {
        let two = [subnet("subnet-1", "a", WayOut::Gateway), subnet("subnet-2", "b", WayOut::Gateway)];
        let verdict = |zones: &[&str]| {
            let zones: Vec<String> = zones.iter().map(|zone| (*zone).to_owned()).collect();
            offered("g5.xlarge", "us-east-1", &two, &zones)
        };
        assert_eq!(verdict(&["a", "b", "c"]).verdict, Verdict::Ok);
        let some = verdict(&["b", "c"]);
        assert_eq!(some.verdict, Verdict::Warn);
        assert!(some.found.ends_with("but not in subnet-1 (a)") && some.todo.unwrap().contains("b, c"));
        assert_eq!(verdict(&["c"]).verdict, Verdict::Fail);
        assert_eq!(verdict(&[]).found, "us-east-1 has no g5.xlarge");
    }

    #[test]
    fn every_subnet_needs_a_way_out() {
        let open = subnet("subnet-1", "a", WayOut::Gateway);
        let nat = subnet("subnet-2", "b", WayOut::Through("nat-1".into()));
        let ok = way_out(&[open.clone(), nat.clone()]);
        assert_eq!(ok.verdict, Verdict::Ok);
        assert_eq!(ok.found, "subnet-1 through an internet gateway, subnet-2 through nat-1");
        let bare = Subnet { gives_addresses: false, ..open.clone() };
        assert_eq!(way_out(&[bare, nat.clone()]).verdict, Verdict::Warn);
        assert_eq!(way_out(&[Subnet { gives_addresses: false, ..nat }]).verdict, Verdict::Ok, "NAT has an address");
        let closed = way_out(&[open, subnet("subnet-3", "a", WayOut::Closed)]);
        assert_eq!((closed.verdict, closed.found.as_str()), (Verdict::Fail, "no default route leads out of subnet-3"));
    }

    #[test]
    fn a_machine_image_needs_a_driver_that_knows_cuda_13() {
        let image = |driver, architecture: &str| MachineImage {
            id: "ami-1".into(),
            name: "x".into(),
            architecture: architecture.into(),
            root_device: Some("/dev/sda1".into()),
            disk_gib: Some(75),
            driver,
        };
        let ok = fit(&image(Some(580), "x86_64"));
        assert_eq!(
            (ok.verdict, ok.found.as_str()),
            (Verdict::Ok, "ami-1, x, root /dev/sda1 of 75 GiB, NVIDIA driver 580")
        );
        assert_eq!(fit(&image(Some(570), "x86_64")).verdict, Verdict::Fail);
        assert_eq!(fit(&image(Some(590), "arm64")).verdict, Verdict::Fail);
        let unsaid = fit(&image(None, "x86_64"));
        assert!(unsaid.verdict == Verdict::Warn && unsaid.found.contains("driver not checked"), "{unsaid:?}");
    }

    #[test]
    fn a_configuration_must_be_there_and_allowed() {
        let error = |kind| Err(Error::new(kind, "x"));
        for (decision, there, verdict, kind) in [
            (Decision::Allowed, Ok(()), Verdict::Ok, None),
            (Decision::Allowed, error(Kind::Permission), Verdict::Warn, None),
            (Decision::Allowed, error(Kind::Data), Verdict::Fail, Some(Kind::Data)),
            (Decision::Unsaid, Ok(()), Verdict::Fail, Some(Kind::Permission)),
            (Decision::Denied, Ok(()), Verdict::Fail, Some(Kind::Permission)),
        ] {
            let line = readable("s3://b/k", "arn:aws:iam::1:role/x", decision, there);
            assert_eq!((line.verdict, line.kind), (verdict, kind), "{decision:?}: {line:?}");
        }
    }

    #[test]
    fn an_image_is_best_near_and_named_by_its_digest() {
        let name = |rest: &str| ImageName::read(&format!("1.dkr.ecr.eu-west-1.amazonaws.com/{rest}")).unwrap();
        let digest = name("trainer@sha256:00");
        let ok = shown(&digest, Some(3 << 30), Some("eu-west-1"));
        assert_eq!((ok.verdict, ok.found.as_str()), (Verdict::Ok, "there, 3.00 GiB to fetch"));
        assert_eq!(shown(&digest, None, None).verdict, Verdict::Ok);
        assert_eq!(shown(&name("trainer:1"), None, None).verdict, Verdict::Warn);
        assert!(shown(&digest, None, Some("us-east-1")).found.contains("while the machines are in us-east-1"));
    }
}
