//! The tests. A name is `subject/what-holds`; the function of the same words
//! stands in the module of the subject.

use std::time::Duration;

use crate::context::Context;
use crate::runner::{Group, Test};
use crate::scenario;

mod audit;
mod bandwidth;
mod beside;
mod binding;
mod chain;
mod churn;
mod cleanup;
mod codec;
mod datapath;
mod drain;
mod faults;
mod foreign;
mod guard;
mod hostport;
mod kube_proxy;
mod library;
mod load;
mod manifests;
mod masquerade;
mod nodeport;
mod pods;
mod reload;
mod restart;
mod rolling;
mod routes;
mod rows;
mod runtime;
mod scheduler;
mod segment;
mod soak;
mod socket;
mod source;
mod start;
mod status;
mod systemd;
mod trace;
mod walk;
pub(crate) mod world;

/// Every test, in the order in which they run: what others build on comes first.
#[must_use]
pub fn all() -> Vec<Test> {
    [
        pods_and_socket(),
        within_a_node(),
        starts(),
        through_an_api(),
        leaving(),
        beyond_a_node(),
        bindings(),
        scenario::tests(),
        with_a_runtime(),
        by_the_counting_clock(),
    ]
    .concat()
}

/// What [`for_a_short_run`] leaves out: long, or close to what stays in.
const SELDOM: &[&str] = &[
    "drain/a-flow-of-udp-moves",
    "trace/live-names-the-broken-step",
    "restart/a-change-while-the-agent-is-dead",
    "source/an-api-gives-what-manifests-give",
    "status/docs-show-a-real-node",
    "faults/other-changes-do-not-put-off-a-retry",
    "faults/pods-go-on-without-a-node-object",
    "beside/pods-on-a-bridge-reach-each-other",
    "routes/foreign-ones-are-left-alone",
    "routes/none-to-a-node-beyond",
    "nodeport/without-endpoints-refused",
    "nodeport/limited-to-chosen-addresses",
    "hostport/conflicts-are-errors",
    "hostport/of-a-killed-agent-goes-on",
    "masquerade/no-service-involved",
    "masquerade/never-from-a-node-port",
    "masquerade/all-cluster-ips-when-asked",
    "binding/a-switch-under-load-loses-nothing",
    "binding/what-others-undo-is-made-again",
    "binding/cleanup-removes-every-binding",
];

/// For an emulated machine of two cores and a quarter of an hour: without some, and with every
/// second scenario. What all scenarios decide is checked without packets in any run.
#[must_use]
pub fn for_a_short_run(tests: Vec<Test>) -> Vec<Test> {
    let mut scenarios = 0;
    let mut stays = |test: &Test| {
        if test.name.starts_with(scenario::PREFIX) {
            scenarios += 1;
            scenarios % 2 == 1
        } else {
            !SELDOM.contains(&test.name)
        }
    };
    tests.into_iter().filter(|test| stays(test)).collect()
}

fn pods_and_socket() -> Vec<Test> {
    let native = |name, minutes, run| test(name, Group::Native, minutes, run);
    vec![
        native(
            "library/answered-refused-unreachable-silent",
            3,
            library::answered_refused_unreachable_silent,
        ),
        native(
            "library/nothing-is-left-of-a-namespace",
            2,
            library::nothing_is_left_of_a_namespace,
        ),
        native("pods/add-and-del", 5, pods::add_and_del),
        native("pods/two-hundred-at-once", 10, pods::two_hundred_at_once),
        native("pods/killed-at-any-step", 10, pods::killed_at_any_step),
        native("pods/del-without-the-agent", 5, pods::del_without_the_agent),
        native(
            "pods/agent-killed-among-adds",
            10,
            pods::agent_killed_among_adds,
        ),
        native(
            "pods/lost-leases-are-adopted",
            5,
            churn::lost_leases_are_adopted,
        ),
        native(
            "pods/lost-leases-and-routes",
            5,
            churn::lost_leases_and_routes,
        ),
        native(
            "pods/killed-at-random",
            churn::minutes(),
            churn::killed_at_random,
        ),
        native(
            "source/the-api-feeds-pods-and-status",
            5,
            source::the_api_feeds_pods_and_status,
        ),
        native(
            "hostport/not-where-services-cannot-be",
            5,
            hostport::not_where_services_cannot_be,
        ),
        native(
            "kube-proxy/served-where-it-did",
            5,
            kube_proxy::served_where_kube_proxy_did,
        ),
        native("socket/survives-garbage", 10, socket::survives_garbage),
        native("socket/refuses-other-users", 2, socket::refuses_other_users),
    ]
}

fn within_a_node() -> Vec<Test> {
    let ipvs = |name, minutes, run| test(name, Group::Ipvs, minutes, run);
    vec![
        ipvs(
            "codec/what-is-set-reads-back",
            5,
            codec::what_is_set_reads_back,
        ),
        ipvs("datapath/every-feature", 5, datapath::every_feature),
        ipvs("datapath/balances-to-both", 10, datapath::balances_to_both),
        ipvs(
            "manifests/an-edit-touches-only-what-changed",
            10,
            manifests::an_edit_touches_only_what_changed,
        ),
        ipvs(
            "manifests/broken-yaml-keeps-the-last-good-state",
            10,
            manifests::broken_yaml_keeps_the_last_good_state,
        ),
        ipvs(
            "scheduler/a-change-breaks-no-connection",
            10,
            scheduler::a_change_breaks_no_connection,
        ),
        ipvs(
            "guard/host-ports-hide-behind-vips",
            15,
            guard::host_ports_hide_behind_vips,
        ),
        ipvs(
            "trace/live-names-the-broken-step",
            15,
            trace::live_names_the_broken_step,
        ),
        ipvs("guard/no-moment-is-open", 10, guard::no_moment_is_open),
        ipvs(
            "restart/a-killed-agent-is-not-missed",
            10,
            restart::a_killed_agent_is_not_missed,
        ),
        ipvs(
            "restart/a-stopped-agent-leaves-everything",
            10,
            restart::a_stopped_agent_leaves_everything,
        ),
        ipvs(
            "restart/what-changed-meanwhile-is-caught-up",
            10,
            restart::what_changed_meanwhile_is_caught_up,
        ),
        ipvs(
            "restart/a-change-while-the-agent-is-dead",
            10,
            audit::a_change_while_the_agent_is_dead,
        ),
        ipvs(
            "source/an-api-gives-what-manifests-give",
            10,
            source::an_api_gives_what_manifests_give,
        ),
        ipvs("foreign/objects-survive", 10, foreign::objects_survive),
        ipvs(
            "kube-proxy/its-settings-reach-the-kernel",
            10,
            kube_proxy::its_settings_reach_the_kernel,
        ),
        ipvs("audit/damage-is-put-right", 20, audit::damage_is_put_right),
        ipvs(
            "status/docs-show-a-real-node",
            10,
            status::docs_show_a_real_node,
        ),
        ipvs(
            "faults/other-changes-do-not-put-off-a-retry",
            10,
            faults::other_changes_do_not_put_off_a_retry,
        ),
        ipvs(
            "faults/pods-go-on-without-a-node-object",
            10,
            faults::pods_go_on_without_a_node_object,
        ),
    ]
}

fn starts() -> Vec<Test> {
    let native = |name, minutes, run| test(name, Group::Native, minutes, run);
    vec![
        native(
            "start/refused-in-one-sentence",
            5,
            start::refused_in_one_sentence,
        ),
        native(
            "start/a-lease-file-in-doubt-is-left-alone",
            5,
            start::a_lease_file_in_doubt_is_left_alone,
        ),
        native(
            "start/a-second-agent-is-refused",
            10,
            start::a_second_agent_is_refused,
        ),
        native(
            "start/a-check-changes-nothing",
            5,
            start::a_check_changes_nothing,
        ),
        native(
            "start/what-this-kernel-lacks-is-told",
            5,
            start::what_the_kernel_lacks_is_told,
        ),
        native(
            "start/every-write-can-fail",
            10,
            start::every_write_can_fail,
        ),
        test(
            "start/what-the-kernel-lacks-is-told",
            Group::Ipvs,
            5,
            start::what_the_kernel_lacks_is_told,
        ),
    ]
}

fn through_an_api() -> Vec<Test> {
    let ipvs = |name, minutes, run| test(name, Group::Ipvs, minutes, run);
    vec![
        test(
            "source/a-large-cluster",
            Group::Native,
            source::large::minutes(),
            source::large::a_large_cluster,
        ),
        ipvs(
            "source/every-scenario-through-both",
            source::scenarios::minutes(),
            source::scenarios::every_scenario_through_both,
        ),
        ipvs(
            "source/starts-without-cluster-addresses",
            10,
            source::bootstrap::starts_without_cluster_addresses,
        ),
        ipvs(
            "source/outlives-a-misbehaving-api",
            source::misbehaving::minutes(),
            source::misbehaving::outlives_a_misbehaving_api,
        ),
    ]
}

fn leaving() -> Vec<Test> {
    let ipvs = |name, minutes, run| test(name, Group::Ipvs, minutes, run);
    vec![
        ipvs(
            "drain/a-connection-outlives-its-endpoint",
            10,
            drain::a_connection_outlives_its_endpoint,
        ),
        ipvs(
            "drain/a-half-closed-connection-goes-on",
            10,
            drain::a_half_closed_connection_goes_on,
        ),
        ipvs(
            "drain/the-last-backend-keeps-its-connections",
            10,
            drain::the_last_backend_keeps_its_connections,
        ),
        ipvs("systemd/the-unit-runs", 15, systemd::the_unit_runs),
        ipvs(
            "drain/clients-within-the-cluster-keep-theirs",
            10,
            drain::clients_within_the_cluster_keep_theirs,
        ),
        ipvs(
            "drain/connections-end-with-who-is-behind-them",
            10,
            drain::connections_end_with_who_is_behind_them,
        ),
        test(
            "drain/time-outs-at-their-length",
            Group::Counted,
            // Of its own clock; most of that is skipped.
            120,
            drain::time_outs_at_their_length,
        ),
        ipvs(
            "reload/a-change-takes-effect-live",
            10,
            reload::a_change_takes_effect_live,
        ),
        ipvs(
            "cleanup/a-node-is-left-as-it-was-found",
            10,
            cleanup::a_node_is_left_as_it_was_found,
        ),
        ipvs(
            "beside/pods-on-a-bridge-reach-each-other",
            10,
            beside::pods_on_a_bridge_reach_each_other,
        ),
        ipvs("drain/a-flow-of-udp-moves", 10, drain::a_flow_of_udp_moves),
        ipvs(
            "rolling/no-request-fails",
            rolling::minutes(),
            rolling::no_request_fails,
        ),
    ]
}

fn beyond_a_node() -> Vec<Test> {
    let ipvs = |name, minutes, run| test(name, Group::Ipvs, minutes, run);
    vec![
        ipvs(
            "routes/follow-the-other-node",
            10,
            routes::follow_the_other_node,
        ),
        ipvs(
            "routes/foreign-ones-are-left-alone",
            10,
            routes::foreign_ones_are_left_alone,
        ),
        ipvs(
            "routes/none-to-a-node-beyond",
            10,
            routes::none_to_a_node_beyond,
        ),
        ipvs(
            "nodeport/answered-on-every-node-address",
            10,
            nodeport::answered_on_every_node_address,
        ),
        ipvs(
            "nodeport/follows-addresses-and-service",
            10,
            nodeport::follows_addresses_and_service,
        ),
        ipvs(
            "nodeport/without-endpoints-refused",
            10,
            nodeport::without_endpoints_refused,
        ),
        ipvs(
            "nodeport/limited-to-chosen-addresses",
            10,
            nodeport::limited_to_chosen_addresses,
        ),
        ipvs(
            "hostport/answered-on-every-node-address",
            10,
            hostport::answered_on_every_node_address,
        ),
        ipvs(
            "hostport/conflicts-are-errors",
            10,
            hostport::conflicts_are_errors,
        ),
        ipvs(
            "hostport/of-a-killed-agent-goes-on",
            10,
            hostport::of_a_killed_agent_goes_on,
        ),
        ipvs("hostport/gone-after-del", 10, hostport::gone_after_del),
        ipvs("masquerade/node-ports", 10, masquerade::node_ports),
        ipvs("masquerade/cluster-ips", 10, masquerade::cluster_ips),
        ipvs(
            "masquerade/no-service-involved",
            10,
            masquerade::no_service_involved,
        ),
        ipvs(
            "masquerade/never-from-a-node-port",
            10,
            masquerade::never_from_a_node_port,
        ),
        ipvs(
            "masquerade/all-cluster-ips-when-asked",
            10,
            masquerade::all_cluster_ips_when_asked,
        ),
        ipvs(
            "walk/kernel-equals-plan",
            walk::minutes(),
            walk::kernel_equals_plan,
        ),
    ]
}

fn bindings() -> Vec<Test> {
    let ipvs = |name, run| test(name, Group::Ipvs, 10, run);
    vec![
        ipvs(
            "binding/every-way-serves-every-client",
            binding::every_way_serves_every_client,
        ),
        ipvs(
            "binding/a-route-gives-processes-of-the-node-their-source",
            binding::a_route_gives_processes_of_the_node_their_source,
        ),
        ipvs(
            "binding/a-switch-under-load-loses-nothing",
            binding::a_switch_under_load_loses_nothing,
        ),
        ipvs(
            "binding/no-neighbour-learns-of-a-vip",
            binding::no_neighbour_learns_of_a_vip,
        ),
        ipvs(
            "binding/what-others-undo-is-made-again",
            binding::what_others_undo_is_made_again,
        ),
        ipvs(
            "binding/cleanup-removes-every-binding",
            binding::cleanup_removes_every_binding,
        ),
    ]
}

fn with_a_runtime() -> Vec<Test> {
    let native = |name, minutes, run| test(name, Group::Native, minutes, run);
    let ipvs = |name, minutes, run| test(name, Group::Ipvs, minutes, run);
    vec![
        native(
            "runtime/a-restarted-agent-knows-its-containers",
            15,
            runtime::a_restarted_agent_knows_its_containers,
        ),
        native(
            "chain/plugins-of-others-follow",
            20,
            chain::plugins_of_others_follow,
        ),
        native("runtime/twenty-at-once", 15, runtime::twenty_at_once),
        ipvs(
            "runtime/containers-call-a-service",
            15,
            runtime::containers_call_a_service,
        ),
    ]
}

fn by_the_counting_clock() -> Vec<Test> {
    let counted = |name, minutes, run| test(name, Group::Counted, minutes, run);
    vec![
        counted(
            "bandwidth/shaped-both-ways",
            10,
            bandwidth::shaped_both_ways,
        ),
        counted(
            "pods/what-is-left-behind-is-put-right",
            20,
            churn::what_is_left_behind_is_put_right,
        ),
    ]
}

fn test(
    name: &'static str,
    group: Group,
    minutes: u64,
    run: fn(&mut Context) -> anyhow::Result<()>,
) -> Test {
    Test {
        name,
        group,
        limit: Duration::from_mins(minutes),
        run,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_distinct() {
        let names: BTreeSet<_> = all().iter().map(|test| test.name).collect();
        assert_eq!(names.len(), all().len());
    }

    #[test]
    fn a_short_run_leaves_out_what_there_is() {
        let all = all();
        for name in SELDOM {
            assert!(all.iter().any(|test| test.name == *name), "{name}");
        }
        let scenarios = |tests: &[Test]| {
            let names = tests.iter().map(|test| test.name);
            names
                .filter(|name| name.starts_with(scenario::PREFIX))
                .count()
        };
        let (whole, short) = (scenarios(&all), scenarios(&for_a_short_run(all)));
        assert_eq!(short, whole.div_ceil(2));
    }
}
