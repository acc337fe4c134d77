//! What EC2 says of the subnets that machines are to be started in: their zones, the way out of each, and which
//! instance types their zones offer. Only asked for, never changed.

use std::{collections::BTreeMap, time::Duration};

use aws_config::timeout::TimeoutConfig;
use serde::{Deserialize, de::DeserializeOwned};

use super::{
    aws,
    call::{Client, EC2, Items},
};
use crate::error::Result;

/// The limit for one request, and for one with all of the SDK's own retries.
const ATTEMPT: Duration = Duration::from_secs(8);
const OPERATION: Duration = Duration::from_secs(15);

/// The way from a subnet to the rest of the world, for IPv4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WayOut {
    /// An internet gateway: a machine needs a public address.
    Gateway,
    /// Something with an address of its own, such as `nat-…` or `tgw-…`.
    Through(String),
    /// There is none.
    Closed,
}

/// A subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subnet {
    /// Its id.
    pub id: String,
    /// Its availability zone, such as `us-east-1a`.
    pub zone: String,
    /// Whether its machines get a public address, unless their launch template says otherwise.
    pub gives_addresses: bool,
    /// The way out.
    pub way: WayOut,
}

/// EC2 in a region.
#[derive(Debug)]
pub struct Network {
    client: Client,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Subnets {
    #[serde(default)]
    subnet_set: Items<SubnetEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SubnetEntry {
    subnet_id: String,
    vpc_id: String,
    availability_zone: String,
    #[serde(default)]
    map_public_ip_on_launch: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tables {
    #[serde(default)]
    route_table_set: Items<Table>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Table {
    vpc_id: String,
    #[serde(default)]
    route_set: Items<Route>,
    #[serde(default)]
    association_set: Items<Association>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Association {
    subnet_id: Option<String>,
    #[serde(default)]
    main: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Route {
    destination_cidr_block: Option<String>,
    state: Option<String>,
    gateway_id: Option<String>,
    nat_gateway_id: Option<String>,
    transit_gateway_id: Option<String>,
    network_interface_id: Option<String>,
    instance_id: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Offerings {
    #[serde(default)]
    instance_type_offering_set: Items<Offering>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Offering {
    location: String,
}

impl Route {
    /// Where it leads, if it is the default route and stands.
    fn way(&self) -> Option<WayOut> {
        let stands = self.destination_cidr_block.as_deref() == Some("0.0.0.0/0")
            && self.state.as_deref().is_none_or(|state| state == "active");
        let to = [
            &self.gateway_id,
            &self.nat_gateway_id,
            &self.transit_gateway_id,
            &self.network_interface_id,
            &self.instance_id,
        ];
        let target = to.into_iter().flatten().find(|target| !target.is_empty()).filter(|_| stands)?;
        Some(if target.starts_with("igw-") { WayOut::Gateway } else { WayOut::Through(target.clone()) })
    }
}

/// The way out of a subnet: by its own table, or by its network's main one.
fn way_out(subnet: &SubnetEntry, tables: &[Table]) -> WayOut {
    let of_network = || tables.iter().filter(|table| table.vpc_id == subnet.vpc_id);
    let has = |table: &&Table, fits: &dyn Fn(&Association) -> bool| table.association_set.item.iter().any(fits);
    let own = of_network().find(|table| has(table, &|of| of.subnet_id.as_deref() == Some(&subnet.subnet_id)));
    let table = own.or_else(|| of_network().find(|table| has(table, &|of| of.main)));
    table.and_then(|table| table.route_set.item.iter().find_map(Route::way)).unwrap_or(WayOut::Closed)
}

impl Network {
    /// EC2 in `region`. No request is made.
    pub async fn open(region: &str) -> Self {
        let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).operation_timeout(OPERATION).build();
        Self { client: Client::new(&aws::config_in(region).await, &EC2, timeouts, None) }
    }

    async fn call<A: DeserializeOwned>(&self, action: &str, doing: &str, parameters: &[(&str, &str)]) -> Result<A> {
        self.client.query(action, parameters).await.map_err(|failure| aws::explain(failure, doing))
    }

    /// These subnets. One that does not exist is an error.
    pub async fn subnets(&self, ids: &[String]) -> Result<Vec<Subnet>> {
        let names: Vec<String> = (1..=ids.len()).map(|n| format!("SubnetId.{n}")).collect();
        let named: Vec<(&str, &str)> = names.iter().map(String::as_str).zip(ids.iter().map(String::as_str)).collect();
        let found: Subnets = self.call("DescribeSubnets", "describe the subnets", &named).await?;
        let entries = found.subnet_set.item;
        let networks: BTreeMap<&str, ()> = entries.iter().map(|subnet| (subnet.vpc_id.as_str(), ())).collect();
        let mut filter = vec![("Filter.1.Name".to_owned(), "vpc-id")];
        filter.extend(networks.keys().enumerate().map(|(at, id)| (format!("Filter.1.Value.{}", at + 1), *id)));
        let filter: Vec<(&str, &str)> = filter.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        let tables: Tables = self.call("DescribeRouteTables", "describe the routes of the subnets", &filter).await?;
        let tables = tables.route_table_set.item;
        let seen = |subnet: &SubnetEntry| Subnet {
            id: subnet.subnet_id.clone(),
            zone: subnet.availability_zone.clone(),
            gives_addresses: subnet.map_public_ip_on_launch,
            way: way_out(subnet, &tables),
        };
        Ok(entries.iter().map(seen).collect())
    }

    /// The zones of the region that offer an instance type.
    pub async fn zones(&self, instance_type: &str) -> Result<Vec<String>> {
        let filter = [
            ("LocationType", "availability-zone"),
            ("Filter.1.Name", "instance-type"),
            ("Filter.1.Value.1", instance_type),
        ];
        let doing = format!("ask where {instance_type} is offered");
        let found: Offerings = self.call("DescribeInstanceTypeOfferings", &doing, &filter).await?;
        Ok(found.instance_type_offering_set.item.into_iter().map(|offering| offering.location).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(text: &str) -> Vec<Table> {
        let text = format!("<R><routeTableSet>{text}</routeTableSet></R>");
        quick_xml::de::from_str::<Tables>(&text).unwrap().route_table_set.item
    }

    fn table(routes: &str, association: &str) -> String {
        format!(
            "<item><routeTableId>rtb-1</routeTableId><vpcId>vpc-1</vpcId><routeSet><item>\
             <destinationCidrBlock>172.31.0.0/16</destinationCidrBlock><gatewayId>local</gatewayId>\
             <state>active</state></item>{routes}</routeSet><associationSet><item>{association}</item>\
             </associationSet></item>"
        )
    }

    fn default_route(to: &str, state: &str) -> String {
        format!("<item><destinationCidrBlock>0.0.0.0/0</destinationCidrBlock>{to}<state>{state}</state></item>")
    }

    #[test]
    fn the_way_out_is_that_of_the_own_table_else_of_the_main_one() {
        let subnet = SubnetEntry {
            subnet_id: "subnet-1".into(),
            vpc_id: "vpc-1".into(),
            availability_zone: "us-east-1a".into(),
            map_public_ip_on_launch: false,
        };
        let (own, main) = ("<subnetId>subnet-1</subnetId><main>false</main>", "<main>true</main>");
        let gateway = default_route("<gatewayId>igw-1</gatewayId>", "active");
        let nat = default_route("<natGatewayId>nat-1</natGatewayId>", "active");
        let gone = default_route("<natGatewayId>nat-2</natGatewayId>", "blackhole");
        let through = |name: &str| WayOut::Through(name.to_owned());
        for (text, way) in [
            (table(&gateway, main), WayOut::Gateway),
            (table(&gateway, main) + &table(&nat, own), through("nat-1")),
            (table(&gateway, main) + &table("", own), WayOut::Closed),
            (table(&gone, main), WayOut::Closed),
            (table(&gateway, "<subnetId>subnet-2</subnetId><main>false</main>"), WayOut::Closed),
            (table(&gateway, main).replace("vpc-1", "vpc-2"), WayOut::Closed),
            (String::new(), WayOut::Closed),
        ] {
            assert_eq!(way_out(&subnet, &tables(&text)), way, "{text}");
        }
    }
}
