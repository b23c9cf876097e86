# What the guest runs (init.sh reads this): run NAME COMMAND...
run conformance/net /epx/tests/conformance_test_net ofi:verbs 200
run conformance/channel /epx/tests/conformance_test_channel ofi:verbs 20000 0
export EPX_NET=ofi:verbs EPX_TEST_PER_DOMAIN=1 EPX_TEST_RANKS_MAX=4
run differential/2x1 /epx/tests/differential_test_ht "two ranks" 5
run differential/3x1 /epx/tests/differential_test_ht "map of 2 experts" 5
export EPX_TEST_PER_DOMAIN=2
run differential/2x2 /epx/tests/differential_test_ht "fp8 and scales" 5
